"""Which token the student's tokenizer would cut first from bytes that the teacher would write.

That is asked of millions of pairs (what stands before, teacher's token), of which few are distinct: each is tokenized once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

UNKNOWN = -1
"""Instead of a token: it hangs on bytes that are not there yet, or is none that the student has."""
IMPOSSIBLE = -2
"""Instead of a token: with these bytes the student's tokenizer would not have cut at this position."""
CLOSED = -1
"""Instead of an opener: whatever the teacher writes next, the token stays."""
MOST_LONGER = 256
"""Longer tokens that are looked at to see whether bytes inside a teacher's token are an opener."""
RARELY = 0.02
"""An opener that leads to a longer token less often than this is taken to do so by its mean."""


class Context(NamedTuple):
    """What stands around a teacher's token, seen from a student's position.

    Attributes:
        history: The student's token before the position, where it bears on the cut; else empty.
        skipped: Bytes between the last boundary of the teacher's and the position.
        path: Bytes between the position and the teacher's token; empty where that holds the position's first byte.
    """

    history: bytes = b""
    skipped: bytes = b""
    path: bytes = b""


class Cuts:
    """The student's first token for a teacher's token in its context.

    A token may *stay open*: the teacher can go on so that the student's tokenizer cuts a longer one, such as `20` or `201` after a teacher's
    `2`. That is so where a token of the student begins with these bytes and the teacher's tokenizer, reading that token, cuts right after
    them. The bytes are then called an opener.

    Args:
        teacher: The teacher's vocabulary.
        student: The student's.
        id_map: Teacher id to student id, −1 without a twin; used for special tokens, which are no bytes.
        student_size: Rows of the student's embedding, if some of its tokenizer's ids have none.

    Attributes:
        vocabulary_size: Ids of the student.
        is_special: `(teacher ids,)`: tokens that go by their text or role and not by bytes.
        first_byte: `(teacher ids,)`: the first byte of a token, 0 without.
        length: `(teacher ids,)`: bytes of a token.
        order: `(teacher ids,)`: place of a token among those that go by their bytes, sorted by them; −1 for special ones.
        end: In place of a teacher id: nothing follows that any token could be made with, as before a special token.
    """

    def __init__(
        self,
        teacher: Vocabulary,
        student: Vocabulary,
        id_map: npt.NDArray[np.int32],
        student_size: int | None = None,
    ) -> None:
        self._teacher, self._student = teacher, student
        self.vocabulary_size = student.size
        self._limit = student.size if student_size is None else student_size
        self._id_map = id_map
        self.is_special = np.ones(teacher.size, np.bool_)
        self.end = teacher.size
        self._bytes: list[bytes] = [b""] * (teacher.size + 1)
        for i, value in teacher.bytes_of.items():
            self.is_special[i] = not value or (i in teacher.added and int(id_map[i]) in student.special)
            self._bytes[i] = value
        self.first_byte = np.array([value[0] if value else 0 for value in self._bytes[:-1]], np.uint8)
        self.length = np.array([len(value) for value in self._bytes[:-1]], np.int64)
        regular = np.flatnonzero(~self.is_special).tolist()
        regular.sort(key=self._bytes.__getitem__)
        self._sorted = [self._bytes[i] for i in regular]
        self.order = np.full(teacher.size, -1, np.int64)
        self.order[regular] = np.arange(len(regular))
        self._contexts: dict[Context, int] = {}
        self._context_list: list[Context] = []
        self._memo: dict[int, tuple[int, int, int]] = {}
        self._inside: list[bytes] = []
        self._stays, self._seen = np.zeros(0), np.zeros(0)
        self._follows: dict[tuple[bytes, int], bool] = {}

    def context(self, context: Context) -> int:
        """The number of a context, for `first`."""
        number = self._contexts.get(context)
        if number is None:
            number = self._contexts[context] = len(self._context_list)
            self._context_list.append(context)
        return number

    def begin_with(self, prefix: bytes) -> tuple[int, int]:
        """Among `order`, the range of the teacher's tokens that begin with some bytes."""
        start = bisect_left(self._sorted, prefix)
        return start, bisect_left(self._sorted, True, lo=start, key=lambda value: not value.startswith(prefix))

    def first(self, contexts: Integers, ids: Integers) -> tuple[Integers, Integers, Integers]:
        """The student's first token.

        Args:
            contexts: `(n,)` numbers of contexts.
            ids: `(n,)` teacher ids, none of them special, or `end`.

        Returns:
            `(n,)` student ids, `UNKNOWN` or `IMPOSSIBLE`; `(n,)` numbers of openers, `CLOSED` where the token cannot change; and the same for
            the cut between the token before and it.
        """
        if not len(ids):
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        keys, back = np.unique(contexts * len(self._bytes) + ids, return_inverse=True)
        wanted = keys.tolist()
        missing = [key for key in wanted if key not in self._memo]
        self._memo.update(zip(missing, self._cut(missing), strict=True))
        found = np.array([self._memo[key] for key in wanted], np.int64)[back]
        return found[:, 0], found[:, 1], found[:, 2]

    def special(self, ids: Integers) -> Integers:
        """The student's id for special tokens of the teacher, `UNKNOWN` where there is none."""
        return self._id_map[ids].astype(np.int64)

    def needs_history(self, last: npt.NDArray[np.uint8], following: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Whether the cut between two bytes, and the token behind it, may hang on what stands before; shapes as numpy broadcasts.

        Where no token of the student has the two bytes side by side there is a cut whatever stands around. Behind it the token is the same
        but after punctuation, to which tokenizers attach what follows by rules of their own.
        """
        return self._side_by_side[last, following] | _ATTACHED[following]

    def learn(self, openers: Integers, shares: Floats) -> None:
        """Note cases of openers `(n,)`: with which probability `(n,)` the token stayed what it was."""
        self._make_room()
        np.add.at(self._stays, openers, shares)
        np.add.at(self._seen, openers, 1.0)

    def stay_share(self, openers: Integers) -> Floats:
        """How often a token stays what it is, whatever the teacher writes next: 1 where it is closed.

        For an opener it is the mean over what was learnt, if that is more than 1 − `RARELY`, and 0 otherwise: then each case has to be looked
        at by itself.
        """
        self._make_room()
        result = np.ones(len(openers))
        is_open = openers != CLOSED
        share = self._stays[openers[is_open]] / np.maximum(self._seen[openers[is_open]], 1.0)
        result[is_open] = np.where(share >= 1.0 - RARELY, share, 0.0)
        return result

    def _make_room(self) -> None:
        count = len(self._openers) + len(self._inside) + 1
        if count > len(self._stays):
            more = np.zeros(2 * count - len(self._stays))
            self._stays, self._seen = np.append(self._stays, more), np.append(self._seen, more)

    def may_follow(self, prefixes: Sequence[bytes], student_ids: Integers) -> npt.NDArray[np.bool_]:
        """Whether the teacher may end a token where some bytes end and go on with those of a student's token; `(n,)`."""
        pairs = list(zip(prefixes, student_ids.tolist(), strict=True))
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._follows]
        texts = [prefix + self._student.bytes_of.get(i, b"") for prefix, i in missing]
        for pair, cut in zip(missing, self._teacher.tokenize(texts), strict=True):
            ends = list(accumulate(len(self._bytes[token]) for token in cut))
            self._follows[pair] = len(pair[0]) in ends or pair[1] not in self._student.bytes_of
        return np.array([self._follows[pair] for pair in pairs], np.bool_)

    def prefixes(self, student_ids: Integers) -> tuple[Integers, Integers]:
        """The openers that may become one of these tokens: places in `student_ids`, and an opener for each."""
        starts, values = self._prefixes
        counts = starts[student_ids + 1] - starts[student_ids]
        places = np.repeat(np.arange(len(student_ids)), counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return places, values[np.repeat(starts[student_ids], counts) + within]

    def _cut(self, keys: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        wanted = []
        for key in keys:
            context, i = divmod(key, len(self._bytes))
            history, skipped, path = self._context_list[context]
            value = path + self._bytes[i] if path or i == self.end else self._bytes[i][len(skipped) :]
            wanted.append((history, skipped, value, i == self.end))
        tokens = self._student.tokenize([history + value for history, _, value, _ in wanted])
        openers = self._openers_inside([(skipped, value) for _, skipped, value, _ in wanted if skipped])
        for (history, skipped, value, is_end), cut in zip(wanted, tokens, strict=True):
            opener = openers[skipped, value] if skipped else self._openers.get(value, CLOSED)
            breaker = self._openers.get(history + value, CLOSED) if history else CLOSED
            first = self._first_of(history, value, cut)
            yield (first, CLOSED, CLOSED) if is_end else (first, opener, breaker)

    def _first_of(self, history: bytes, value: bytes, cut: list[int]) -> int:
        bytes_of = self._student.bytes_of
        if history and cut:
            if bytes_of.get(cut[0]) != history:
                return IMPOSSIBLE
            cut = cut[1:]
        if not cut or cut[0] >= self._limit or not value.startswith(bytes_of.get(cut[0], b"\xff")):
            return UNKNOWN
        return cut[0]

    def _openers_inside(self, wanted: Sequence[tuple[bytes, bytes]]) -> dict[tuple[bytes, bytes], int]:
        """Openers among bytes that follow others inside a token of the teacher, which bear on where its tokenizer cuts."""
        result = dict.fromkeys(wanted, CLOSED)
        pairs, texts = [], []
        for skipped, value in result:
            for longer in self._longer(value):
                pairs.append((skipped, value))
                texts.append(skipped + longer)
        for (skipped, value), cut in zip(pairs, self._teacher.tokenize(texts), strict=True):
            ends = accumulate(len(self._bytes[token]) for token in cut)
            if result[skipped, value] == CLOSED and len(skipped) + len(value) in ends:
                self._inside.append(value)
                result[skipped, value] = len(self._openers) + len(self._inside) - 1
        return result

    def _longer(self, value: bytes) -> list[bytes]:
        """The student's tokens that begin with some bytes, and are longer; of many those with the lowest ids, which are the frequent ones."""
        if not value:
            return []
        values, ids = self._student_sorted
        start = bisect_right(values, value)
        stop = bisect_left(values, True, lo=start, key=lambda other: not other.startswith(value))
        if stop - start <= MOST_LONGER:
            return values[start:stop]
        return [values[start + place] for place in np.argsort(ids[start:stop])[:MOST_LONGER]]

    def inside_opener(self, opener: int) -> bytes | None:
        """The bytes of an opener inside a token of the teacher, of which `prefixes` knows nothing."""
        number = opener - len(self._openers)
        return self._inside[number] if number >= 0 else None

    def begins(self, student_id: int, value: bytes) -> bool:
        """Whether a token of the student begins with some bytes."""
        return self._student.bytes_of.get(student_id, b"").startswith(value)

    @cached_property
    def _student_sorted(self) -> tuple[list[bytes], Integers]:
        ids = sorted(self._student.bytes_of, key=self._student.bytes_of.__getitem__)
        return [self._student.bytes_of[i] for i in ids], np.array(ids, np.int64)

    @cached_property
    def _openers(self) -> dict[bytes, int]:
        return self._find_openers[0]

    @cached_property
    def _prefixes(self) -> tuple[Integers, Integers]:
        _, starts, values = self._find_openers
        return starts, values

    @cached_property
    def _find_openers(self) -> tuple[dict[bytes, int], Integers, Integers]:
        """Openers by their bytes; and for each student token, as offsets and values, those it begins with."""
        ids = [i for i, value in self._student.bytes_of.items() if len(value) > 1]
        openers: dict[bytes, int] = {}
        begins: list[list[int]] = [[] for _ in range(self.vocabulary_size)]
        values = [self._student.bytes_of[i] for i in ids]
        lengths = [len(value) for value in self._bytes]
        for i, value, cut in zip(ids, values, self._teacher.tokenize(values), strict=True):
            for end in accumulate(lengths[token] for token in cut[:-1]):
                begins[i].append(openers.setdefault(value[:end], len(openers)))
        starts = np.cumsum([0, *map(len, begins)])
        return openers, starts, np.array([opener for some in begins for opener in some], np.int64)

    @cached_property
    def _side_by_side(self) -> npt.NDArray[np.bool_]:
        """`(256, 256)`: pairs of bytes that some token of the student has side by side."""
        pairs = np.zeros(1 << 16, np.bool_)
        for value in self._student.bytes_of.values():
            codes = np.frombuffer(value, np.uint8).astype(np.int64)
            pairs[(codes[:-1] << 8) + codes[1:]] = True
        return pairs.reshape(256, 256)


_ATTACHED = np.array([byte >= 0x80 or not (chr(byte).isalnum() or chr(byte).isspace()) for byte in range(256)])
