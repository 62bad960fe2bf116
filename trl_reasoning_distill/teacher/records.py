"""`TopKLogProbs`: what the teacher said at each of n positions, cut to its M most likely tokens.

Only differences of logits mean anything, so a record is kept on the scale where the log-sum-exp at T = 1 is zero: the logit of a
token *is* its log-probability. One number more per temperature, `lse_T = log Σ_v exp(log_prob_v / T)` over the whole vocabulary,
then gives the exact distribution at that temperature, and with it the exact mass outside the M tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MISSING_ID = -1
"""The id of an empty place in a record: no token, no mass."""


@dataclasses.dataclass(frozen=True)
class TopKLogProbs:
    """The M most likely tokens at n positions, and what is needed to know the rest exactly.

    Attributes:
        ids: `(n, M)` int32, most likely first; −1 where there is none.
        log_probs: `(n, M)` float32, in nats, at T = 1; −inf where the id is −1. Where there is one temperature only, at that one: sums
            over tokens, as an alignment between two tokenizers makes them, cannot be taken to another.
        log_sum_exp: `(n, len(temperatures))` float32, of `logits / T` over the whole vocabulary.
        temperatures: The temperatures that `log_sum_exp` was taken at; 1.0 is among them, or there is only one.
        log_tail: `(n, len(temperatures))` float32, the log of the mass outside the M tokens at each temperature, summed from those
            tokens. `None` where nobody has summed it: `1 − Σ exp` in float32 knows a tail to 1e-7, and reverse KL takes its logarithm.
    """

    ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    log_sum_exp: npt.NDArray[np.float32]
    temperatures: tuple[float, ...]
    log_tail: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"Records want ids and log_probs of one shape (n, M), found {self.ids.shape} and {self.log_probs.shape}."
            )
        if self.log_sum_exp.shape != (len(self.ids), len(self.temperatures)):
            raise ValueError(
                f"Records want log_sum_exp of shape (n, temperatures) = ({len(self.ids)}, {len(self.temperatures)}), "
                f"found {self.log_sum_exp.shape}."
            )
        if self.log_tail is not None and self.log_tail.shape != self.log_sum_exp.shape:
            raise ValueError(
                f"Records want log_tail of the shape of log_sum_exp, {self.log_sum_exp.shape}, found {self.log_tail.shape}."
            )
        if 1.0 not in self.temperatures and len(self.temperatures) != 1:
            raise ValueError(f"Records want T = 1 among their temperatures, found {self.temperatures}.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        """M, the number of places per record."""
        return self.ids.shape[1]

    def at_temperature(self, temperature: float) -> npt.NDArray[np.float32]:
        """Log-probabilities of the kept tokens at a captured temperature.

        Args:
            temperature: One of `temperatures`.

        Returns:
            `(n, M)` float32: `log p_T(i) = z_i / T − lse_T` with `z_i = log_prob_i + lse_1`; −inf where the id is −1.

        Raises:
            ValueError: If the log-sum-exp at that temperature was not captured: the tail could not be known.
        """
        column, base = temperature_index(self.temperatures, temperature), base_column(self.temperatures)
        if column == base:
            return self.log_probs
        offset = self.log_sum_exp[:, base] / np.float32(temperature) - self.log_sum_exp[:, column]
        return self.log_probs / np.float32(temperature) + offset[:, None]

    def tail_outside(self, kept: npt.NDArray[np.bool_], temperature: float) -> npt.NDArray[np.float32] | None:
        """The log of the mass of all tokens but the kept ones, at a captured temperature.

        Args:
            kept: `(n, M)`, the places of a record that stay.
            temperature: One of `temperatures`.

        Returns:
            `(n,)` float32, or `None` if `log_tail` is.

        Raises:
            ValueError: As `at_temperature`.
        """
        column = temperature_index(self.temperatures, temperature)
        if self.log_tail is None:
            return None
        dropped = np.where(kept, -np.inf, self.at_temperature(temperature))
        parts = np.column_stack([self.log_tail[:, column], dropped])
        return np.logaddexp.reduce(parts, axis=1).astype(np.float32)

    def normalized(self) -> TopKLogProbs:
        """The same distributions on the scale where the log-sum-exp that goes with `log_probs` is zero."""
        base = base_column(self.temperatures)
        lse = self.log_sum_exp[:, base]
        if not lse.any():
            return self
        shift = lse[:, None] * np.float32(self.temperatures[base]) / np.asarray(self.temperatures, np.float32)
        return dataclasses.replace(self, log_sum_exp=(self.log_sum_exp - shift).astype(np.float32))

    def take(self, rows: npt.NDArray[np.integer] | slice) -> TopKLogProbs:
        """The records at the given rows, in that order."""
        return TopKLogProbs(
            self.ids[rows],
            self.log_probs[rows],
            self.log_sum_exp[rows],
            self.temperatures,
            None if self.log_tail is None else self.log_tail[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TopKLogProbs]) -> TopKLogProbs:
        """Records of several parts, one after another; all of one width and with the same temperatures.

        The tail is known if it is in all parts that hold a record.
        """
        first = parts[0]
        for part in parts[1:]:
            if part.temperatures != first.temperatures or part.top_k != first.top_k:
                raise ValueError(
                    f"Records of M = {first.top_k} at {first.temperatures} cannot be joined with records of "
                    f"M = {part.top_k} at {part.temperatures}."
                )
        if len(parts) == 1:
            return first
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.log_probs for part in parts]),
            np.concatenate([part.log_sum_exp for part in parts]),
            first.temperatures,
            _joined([part.log_tail for part in parts if len(part)]),
        )

    @classmethod
    def empty(cls, top_k: int, temperatures: Sequence[float] = (1.0,)) -> TopKLogProbs:
        """No record at all, of the given width."""
        return cls(
            np.empty((0, top_k), np.int32),
            np.empty((0, top_k), np.float32),
            np.empty((0, len(temperatures)), np.float32),
            tuple(temperatures),
            np.empty((0, len(temperatures)), np.float32),
        )


def _joined(tails: Sequence[npt.NDArray[np.float32] | None]) -> npt.NDArray[np.float32] | None:
    known = [tail for tail in tails if tail is not None]
    return np.concatenate(known) if known and len(known) == len(tails) else None


def base_column(temperatures: Sequence[float]) -> int:
    """The column of the temperature that `log_probs` are at: 1, or the only one there is."""
    return temperatures.index(1.0) if 1.0 in temperatures else 0


def temperature_index(temperatures: Sequence[float], temperature: float) -> int:
    """The column of a temperature, or a `ValueError` that says which there are."""
    for column, captured in enumerate(temperatures):
        if abs(captured - temperature) <= 1e-6 * captured:
            return column
    raise ValueError(
        f"Temperature {temperature:g} was not captured: this store has {', '.join(f'{t:g}' for t in temperatures)}. "
        f"Use one of these, or capture again with --temperatures including {temperature:g}; a server as teacher tells T = 1 only."
    )
