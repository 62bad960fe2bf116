"""How many of the student's tokens have a target, and how much of the teacher's mass is in it, by class of token."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from trl_reasoning_distill.teacher.records import MISSING_ID
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary

ALL = "all"
_CLASSES = {
    "digits": re.compile(r"\d"),
    "multi-digit": re.compile(r"\d\d"),
    "operators and LaTeX": re.compile(r"[-+*/=<>^_\\{}$%|~&×÷·±≤≥≠√]"),
    "words": re.compile(r"[^\W\d_]"),
}
SPECIALS = "specials"
CLASSES = (ALL, *_CLASSES, SPECIALS)
"""A token may be in several: each multi-digit token is one of the digits, and `\\frac` is a word as well."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Of one class of tokens.

    Attributes:
        positions: Supervised positions with a token of the class.
        kept_positions: How many of them have a target.
        mass: Mean mass of the tokens of these targets; the rest is tail.
    """

    positions: int
    kept_positions: int
    mass: float

    @property
    def share(self) -> float:
        """Share of the positions that have a target; 1 where there are none."""
        return self.kept_positions / self.positions if self.positions else 1.0


class CoverageTally:
    """Counts targets by the class of the token that the text has.

    Args:
        student: The student's vocabulary.
    """

    def __init__(self, student: Vocabulary) -> None:
        self._is_of = np.zeros((student.size, len(CLASSES)), np.bool_)
        self._is_of[:, 0] = True
        for i, value in student.bytes_of.items():
            text = value.decode(errors="replace")
            self._is_of[i, 1:-1] = [pattern.search(text) is not None for pattern in _CLASSES.values()]
        self._is_of[list(student.special), -1] = True
        self._positions, self._kept = (np.zeros(len(CLASSES), np.int64) for _ in range(2))
        self._mass = np.zeros(len(CLASSES))

    def add(
        self, tokens: npt.NDArray[np.integer], ids: npt.NDArray[np.integer], log_probs: npt.NDArray[np.floating]
    ) -> None:
        """Add positions: the tokens of the text `(n,)`, and their targets `(n, K)`."""
        is_of = self._is_of[tokens]
        kept = ids[:, 0] != MISSING_ID
        self._positions += is_of.sum(axis=0)
        self._kept += is_of[kept].sum(axis=0)
        self._mass += np.exp(log_probs[kept], dtype=np.float64).sum(axis=1) @ is_of[kept]

    def by_class(self) -> dict[str, Coverage]:
        """What was added, by the names in `CLASSES`."""
        counts = zip(CLASSES, self._positions.tolist(), self._kept.tolist(), self._mass.tolist(), strict=True)
        return {name: Coverage(positions, kept, mass / max(1, kept)) for name, positions, kept, mass in counts}


def describe_coverage(by_class: Mapping[str, Coverage]) -> str:
    """A line per class of token that occurs."""
    return "\n".join(
        f"  {name + ':':<21}{one.kept_positions:>10,} of {one.positions:>10,} positions have a target ({one.share:.1%}), "
        f"with {one.mass:.4f} of the teacher's mass on average"
        for name, one in by_class.items()
        if one.positions
    )
