"""The teacher's distribution over the student's tokens, from its distributions over its own.

Both read the same bytes, so the events are events about bytes. At a student's position the bytes before it are given, and the teacher's
text from the last of its own boundaries on is followed:

- Each token the teacher might write there counts for the token that the student's tokenizer would cut first from its bytes.
- Where the position lies inside a token of the teacher, only the tokens that begin with the bytes read so far count, relative to each other.
- Where that first token hangs on what comes next (the student's token is longer, or may become so), the teacher's next distribution
  decides: it is known for the token that the text has, and the chain rule gives the product. For any other token it is not known, and its
  mass is left to the tail.
- A token with which the student's tokenizer would not have cut at this position cannot come, and is taken out.

Up to `TOLERANCE` the mass of a token in a target is never more than the exact one, and what is missing is in the tail. Sums of
probabilities do not commute with temperature: a target is made for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from trl_reasoning_distill.teacher.records import MISSING_ID
from trl_reasoning_distill.teacher.store.cuts import CLOSED, IMPOSSIBLE, Context, Cuts

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DEEPEST_CHAIN = 32
"""Tokens of the teacher that are followed for one of the student's."""
LEAST_KNOWN = 0.5
"""Inside a longer token: a position has no target if less than this of what is relative to each other may be known."""
TOLERANCE = 1e-3
"""A token is left to the tail if more than this share of its mass may still come to it from tokens that stay open."""


@dataclasses.dataclass(frozen=True)
class TeacherText:
    """The teacher's supervised tokens, one per distribution.

    Attributes:
        ids: `(r,)` the token that the text has.
        values: `(r,)` its bytes; empty for a special token that has a twin.
        continues: `(r,)` bool: whether the next distribution is that of the token that follows in the text.
    """

    ids: Integers
    values: Sequence[bytes]
    continues: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class StudentPositions:
    """Positions of the student, and where they lie in the teacher's text.

    Attributes:
        records: `(n,)` the teacher's token that holds the position's first byte; −1 where there is none.
        skipped: `(n,)` bytes of that token that stand before the position.
        ids: `(n,)` the student's token.
        lengths: `(n,)` its bytes.
        history: `(n,)` bytes of the student's token before; empty where that is not known or special.
    """

    records: Integers
    skipped: Integers
    ids: Integers
    lengths: Integers
    history: Sequence[bytes]


def learn_openers(
    ids: npt.NDArray[np.integer],
    log_probs: npt.NDArray[np.floating],
    text: TeacherText,
    positions: StudentPositions,
    cuts: Cuts,
) -> None:
    """Learn from some text how often tokens that stay open become longer ones, for `student_targets`; arguments as there."""
    for opener, share in _Walk.over(ids, log_probs, text, positions, cuts).openers:
        cuts.learn(opener, share)


def student_targets(
    ids: npt.NDArray[np.integer],
    log_probs: npt.NDArray[np.floating],
    text: TeacherText,
    positions: StudentPositions,
    cuts: Cuts,
    top_k: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Targets over the student's tokens.

    Args:
        ids: `(r, M)` teacher ids, −1 where there is none: a Top-M, or the whole vocabulary (then also as `(V,)` that broadcasts).
        log_probs: `(r, M)` at the temperature of the targets, in nats.
        text: What the teacher read.
        positions: The student's.
        cuts: Of this teacher and this student.
        top_k: K, places of a target.

    Returns:
        `(n, K)` student ids, most likely first, −1 where there is none; and `(n, K)` log-probabilities, −inf there. What is not in them is
        the tail.
    """
    walk = _Walk.over(ids, log_probs, text, positions, cuts)
    return _ranked(*walk.targets(), shape=(len(positions.ids), top_k))


@dataclasses.dataclass(frozen=True)
class _Visits:
    """Distributions that are looked at: for which position, and with which probability the teacher comes there by which bytes.

    `first` and `opener` are those of the bytes: what the student's first token is unless the next ones change it.
    """

    positions: Integers
    records: Integers
    mass: Floats
    path: list[bytes]
    first: Integers
    opener: Integers

    @cached_property
    def has_path(self) -> npt.NDArray[np.bool_]:
        return np.array([bool(path) for path in self.path], np.bool_)

    @cached_property
    def first_byte(self) -> npt.NDArray[np.uint8]:
        return np.array([path[0] if path else 0 for path in self.path], np.uint8)


class _Walk:
    """From each position on along the teacher's text, all positions at once, gathering what is found by position and token."""

    def __init__(
        self,
        ids: npt.NDArray[np.integer],
        probs: Floats,
        text: TeacherText,
        positions: StudentPositions,
        cuts: Cuts,
    ) -> None:
        self.ids, self.probs, self.text, self.at, self.cuts = ids, probs, text, positions, cuts
        self.skipped = [
            text.values[record][:count] if record >= 0 else b""
            for record, count in zip(positions.records.tolist(), positions.skipped.tolist(), strict=True)
        ]
        self.last_byte = np.array([value[-1] if value else 0 for value in positions.history], np.uint8)
        self.has_history = np.array([bool(value) for value in positions.history], np.bool_)
        self.known = np.ones(len(positions.ids))  # mass that goes with the bytes read so far
        self.unknown = np.zeros(len(positions.ids))  # most that could be added to it by tokens outside the Top-M
        self.found: list[tuple[Integers, Integers, Floats]] = []  # position, student's token, mass
        self.open: list[tuple[Integers, Integers, Integers, Floats]] = []  # position, student's token, opener, mass
        self.undecided = np.zeros(
            len(positions.ids)
        )  # mass that goes with them unless the next bytes take back the cut here
        self.nothing_left = np.zeros(len(positions.ids))  # mass of tokens that end where the position begins
        self.openers: list[tuple[Integers, Floats]] = []  # opener, share of what follows that leaves the token as it is

    @classmethod
    def over(
        cls,
        ids: npt.NDArray[np.integer],
        log_probs: npt.NDArray[np.floating],
        text: TeacherText,
        positions: StudentPositions,
        cuts: Cuts,
    ) -> _Walk:
        """Follow every position until its tokens cannot change any more."""
        ids = np.broadcast_to(np.where(ids < cuts.end, ids, MISSING_ID), log_probs.shape)  # beyond: a padded embedding
        probs = np.where(ids == MISSING_ID, 0.0, np.exp(log_probs.astype(np.float64)))
        walk = cls(ids, probs, text, positions, cuts)
        walk._run()
        return walk

    def _run(self) -> None:
        here = np.flatnonzero(self.at.records >= 0)
        nothing = np.full(len(here), CLOSED, np.int64)
        visits = _Visits(here, self.at.records[here], np.ones(len(here)), [b""] * len(here), nothing, nothing)
        for _ in range(DEEPEST_CHAIN):
            if not len(visits.positions):
                return
            visits = self._step(visits)

    def targets(self) -> tuple[Integers, Integers, Floats]:
        """Position, student's token and probability, each pair once."""
        size = self.cuts.vocabulary_size
        keys, mass = _sums([(place * size + token, mass) for place, token, mass in self.found])
        place, token = np.divmod(keys, size)
        keep = self._may_still_come(place, token, mass) <= TOLERANCE * mass
        total = np.maximum(self.known + self.unknown, 1e-300)
        keep &= (self.unknown <= (1.0 - LEAST_KNOWN) * total)[place] & (mass > 0.0)
        place, token, probs = place[keep], token[keep], mass[keep] / total[place[keep]]
        keep = self._is_decided(
            np.bincount(place, probs, minlength=len(total)).astype(np.float64), self.undecided / total
        )[place]
        return place[keep], token[keep], probs[keep]

    def _is_decided(self, listed: Floats, undecided: Floats) -> npt.NDArray[np.bool_]:
        """Whether it matters little that some of what goes with the bytes read so far may still take back the cut here.

        Without it all that is listed would grow by a factor of up to 1 + δ, at the cost of the tail: a divergence of about δ² / (2 tail).
        """
        return undecided**2 <= TOLERANCE * np.clip(1.0 - listed, 0.0, None)

    def _step(self, visits: _Visits) -> _Visits:
        """Count what is settled in these distributions; returns the next ones, where it hangs on them."""
        ids = self.ids[visits.records]
        visit, column = np.nonzero((ids != MISSING_ID) & self._begins_rightly(visits, ids))
        token = ids[visit, column].astype(np.int64)
        place, record = visits.positions[visit], visits.records[visit]
        mass = visits.mass[visit] * self.probs[record, column]
        first, opener, breaker = self._cut(visits, visit, token)

        is_text = token == self.text.ids[record]
        is_settled = (opener == CLOSED) & (first == self.at.ids[place]) & self._covers(visits)[visit]
        is_settled |= self.cuts.is_special[token]
        stays = self.cuts.stay_share(opener)
        counts = (first >= 0) & (stays > 0.0) & (is_settled | ~is_text)
        self.found.append((place[counts], first[counts], mass[counts] * stays[counts]))
        impossible = (first == IMPOSSIBLE) & ~is_text
        np.subtract.at(self.known, place[impossible], mass[impossible])
        may_break = (first != IMPOSSIBLE) & (self.cuts.stay_share(breaker) == 0.0) & ~is_text
        np.add.at(self.undecided, place[may_break], mass[may_break])
        is_open = (stays == 0.0) & ~is_text
        self.open.append((place[is_open], first[is_open], opener[is_open], mass[is_open]))

        self._note(visits, visit, mass, first, opener)

        on = np.flatnonzero(is_text & ~is_settled & self.text.continues[record])
        path = [
            visits.path[v] + self.text.values[r] if visits.path[v] else self.text.values[r][skipped:]
            for v, r, skipped in zip(
                visit[on].tolist(), record[on].tolist(), self.at.skipped[place[on]].tolist(), strict=True
            )
        ]
        return _Visits(place[on], record[on] + 1, mass[on], path, first[on], opener[on])

    def _note(self, visits: _Visits, visit: Integers, mass: Floats, first: Integers, opener: Integers) -> None:
        """Note for each opener how much of what follows it leaves the token as it is."""
        counted = first != IMPOSSIBLE
        seen = np.bincount(visit[counted], mass[counted], minlength=len(visits.path))
        stay = counted & (first == visits.first[visit]) & (opener == CLOSED)
        stays = np.bincount(visit[stay], mass[stay], minlength=len(visits.path))
        opened = np.flatnonzero((visits.opener != CLOSED) & (seen > 0.0))
        self.openers.append((visits.opener[opened], (stays / np.maximum(seen, 1e-300))[opened]))

    def _begins_rightly(self, visits: _Visits, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which tokens begin with the bytes read so far; notes how much of the distribution they are."""
        result = np.ones(ids.shape, np.bool_)
        inside = np.flatnonzero((self.at.skipped[visits.positions] > 0) & ~visits.has_path)
        if not len(inside):
            return result
        place, probs, missing = visits.positions[inside], self.probs[visits.records[inside]], ids[inside] == MISSING_ID
        ranges = np.array([self.cuts.begin_with(self.skipped[position]) for position in place.tolist()], np.int64)
        order = np.where(missing, -1, self.cuts.order[ids[inside]])
        result[inside] = begins = (order >= ranges[:, :1]) & (order < ranges[:, 1:])
        ends_here = begins & (self.cuts.length[ids[inside]] == self.at.skipped[place][:, None])
        self.nothing_left[place] = np.where(ends_here, probs, 0.0).sum(axis=1)
        self.known[place] = np.where(begins, probs, 0.0).sum(axis=1)
        others = ranges[:, 1] - ranges[:, 0] - begins.sum(axis=1)
        least = np.where(missing, 1.0, probs).min(axis=1)  # no token outside the Top-M has more
        self.unknown[place] = np.minimum(np.clip(1.0 - probs.sum(axis=1), 0.0, None), others * least)
        return result

    def _cut(self, visits: _Visits, visit: Integers, token: Integers) -> tuple[Integers, Integers, Integers]:
        """`Cuts.first` of each teacher's token that is looked at."""
        plain, with_history = self._contexts(visits)
        place, has_path = visits.positions[visit], visits.has_path[visit]
        is_special = self.cuts.is_special[token]
        following = np.where(has_path, visits.first_byte[visit], self.cuts.first_byte[token])
        needs_history = (self.at.skipped[place] > 0) & ~has_path
        needs_history |= self.cuts.needs_history(self.last_byte[place], following)
        contexts = np.where(needs_history & self.has_history[place], with_history[visit], plain[visit])
        first = self.cuts.special(token)
        opener, breaker = np.full((2, len(token)), CLOSED, np.int64)
        by_bytes = ~is_special | has_path
        read = np.where(is_special, self.cuts.end, token)
        first[by_bytes], opener[by_bytes], breaker[by_bytes] = self.cuts.first(contexts[by_bytes], read[by_bytes])
        return first, opener, breaker

    def _contexts(self, visits: _Visits) -> tuple[Integers, Integers]:
        """The context of each visit, without and with the student's token before."""
        plain, with_history = [], []
        for position, path in zip(visits.positions.tolist(), visits.path, strict=True):
            skipped = self.skipped[position]
            plain.append(self.cuts.context(Context(b"", skipped, path)))
            with_history.append(self.cuts.context(Context(self.at.history[position], skipped, path)))
        return np.array(plain, np.int64), np.array(with_history, np.int64)

    def _covers(self, visits: _Visits) -> npt.NDArray[np.bool_]:
        """Whether the student's token ends within the bytes up to the end of the teacher's token in the text."""
        ends = [
            len(path) + len(self.text.values[record])
            for path, record in zip(visits.path, visits.records.tolist(), strict=True)
        ]
        skipped = np.where(visits.has_path, 0, self.at.skipped[visits.positions])
        return np.array(ends, np.int64) - skipped >= self.at.lengths[visits.positions]

    def _may_still_come(self, place: Integers, token: Integers, mass: Floats) -> Floats:
        """Mass of tokens that stay open and could become this one, `(found,)`."""
        size = self.cuts.vocabulary_size
        result = np.zeros(len(place))
        at = np.flatnonzero(self.nothing_left[place] > TOLERANCE * mass)
        follows = self.cuts.may_follow([self.skipped[position] for position in place[at].tolist()], token[at])
        result[at] = self.nothing_left[place[at]] * follows
        if not any(len(one[0]) for one in self.open):
            return result
        keys, sums = _sums(
            [(at[first >= 0] * size + first[first >= 0], mass[first >= 0]) for at, first, _, mass in self.open]
        )
        result += _look_up(keys, sums, place * size + token)
        openers = 1 + max(int(opener.max(initial=0)) for *_, opener, _ in self.open)
        keys, sums = _sums([(at * openers + opener, mass) for at, _, opener, mass in self.open])
        found, opener = self.cuts.prefixes(token)
        known = opener < openers
        found, opener = found[known], opener[known]
        np.add.at(result, found, _look_up(keys, sums, place[found] * openers + opener))
        for key, more in zip(keys.tolist(), sums.tolist(), strict=True):
            value = self.cuts.inside_opener(key % openers)
            if value is not None:
                for number in np.flatnonzero(place == key // openers).tolist():
                    result[number] += more * self.cuts.begins(int(token[number]), value)
        return result


def _sums(parts: Sequence[tuple[Integers, Floats]]) -> tuple[Integers, Floats]:
    """The distinct keys, sorted, and the sum of the values of each."""
    keys, back = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    values = np.concatenate([values for _, values in parts])
    return keys.astype(np.int64), np.bincount(back, values, minlength=len(keys)).astype(np.float64)


def _look_up(keys: Integers, values: Floats, wanted: Integers) -> Floats:
    """The value of each wanted key, 0 where there is none."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)


def _ranked(
    place: Integers, token: Integers, probs: Floats, *, shape: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The most likely tokens of each position, in `shape`."""
    order = np.lexsort((token, -probs, place))
    place, token, probs = place[order], token[order], probs[order]
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    kept = rank < shape[1]
    ids = np.full(shape, MISSING_ID, np.int32)
    log_probs = np.full(shape, -np.inf, np.float32)
    ids[place[kept], rank[kept]] = token[kept]
    log_probs[place[kept], rank[kept]] = np.log(np.minimum(probs[kept], 1.0))
    return ids, log_probs
