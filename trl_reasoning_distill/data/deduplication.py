"""Each problem once: the same question, or nearly the same one, is left out.

*Exact*: equal words, whatever the punctuation, case and spacing. *Near*: MinHash finds questions of which a large share of the word
3-grams is shared, and their Jaccard similarity is then computed exactly. Two problems with other numbers, or with another answer, are two
problems however much they are alike: mathematics is full of such pairs, and GSM-hard is GSM8K with other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import Refusal
from trl_reasoning_distill.data.words import ngram_hashes, numbers, question_hash, words
from trl_reasoning_distill.extras import require_extra

_SHINGLE = 3
_PERMUTATIONS = 128
_MARGIN = 0.8  # look for candidates below the threshold: at the threshold itself, hashing misses every second one
_SCHEME = "affine32"  # datasketch permutes 32-bit values; a shingle's hash is good without another


@dataclass(frozen=True)
class _Entry:
    """What is kept of a problem that was admitted."""

    id: str
    answer: str | None
    numbers: tuple[str, ...]
    shingles: np.ndarray


class Deduplicator:
    """Remembers the problems it was asked about, and refuses those that it has seen.

    Args:
        threshold: Jaccard similarity of the questions' word 3-grams from which on they are near duplicates; `None` finds exact ones only.

    Raises:
        ValueError: If the threshold is not in (0, 1].
        MissingExtraError: If near duplicates are wanted and datasketch is not installed.
    """

    def __init__(self, threshold: float | None = 0.8) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"near_duplicate_threshold={threshold}: must be above 0 and at most 1.")
        self.threshold = threshold
        self._exact: dict[int, tuple[str, str | None]] = {}
        self._near: list[_Entry] = []
        self._index: Any = None
        if threshold is not None:
            self._sketch = require_extra("data", "datasketch")
            self._index = self._sketch.MinHashLSH(threshold=_MARGIN * threshold, num_perm=_PERMUTATIONS)
            self._permutations = self._sketch.MinHash(num_perm=_PERMUTATIONS, scheme=_SCHEME).permutations

    def __call__(self, problem: Problem) -> Refusal | None:
        """`None` for a problem that is new; it then counts as seen."""
        tokens = words(problem.question)
        key = question_hash(problem.question, tokens)
        if key in self._exact:
            first, answer = self._exact[key]
            other = "" if answer == problem.answer else f", which gives the answer {answer!r}, not {problem.answer!r}"
            return Refusal("duplicate", f"the same question as {first}{other}")
        if self._index is not None and (refusal := self._find_near(problem, tokens)):
            return refusal
        self._exact[key] = (problem.id, problem.answer)
        return None

    def _find_near(self, problem: Problem, tokens: list[str]) -> Refusal | None:
        hashes = ngram_hashes(tokens, min(_SHINGLE, len(tokens)) or 1)
        entry = _Entry(problem.id, problem.answer, numbers(tokens), np.unique(np.array(hashes, dtype=np.uint64)))
        sketch = self._sketch.MinHash(hashfunc=int, permutations=self._permutations, scheme=_SCHEME)
        sketch.update_batch((entry.shingles & 0xFFFFFFFF).tolist())
        for candidate in sorted(self._index.query(sketch)):
            other = self._near[candidate]
            if other.numbers != entry.numbers or (other.answer and entry.answer and other.answer != entry.answer):
                continue
            similarity = _jaccard(entry.shingles, other.shingles)
            if similarity >= (self.threshold or 0):
                return Refusal("near_duplicate", f"{similarity:.0%} of its word 3-grams are those of {other.id}")
        self._index.insert(len(self._near), sketch, check_duplication=False)
        self._near.append(entry)
        return None


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)
