"""The student's tokens of a row, found in the teacher's tokens of the same text, and their targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trl_reasoning_distill.data.tokenization import TokenizedExample, supervised_positions, tokenize_example
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.cuts import Cuts
from trl_reasoning_distill.teacher.store.marginals import StudentPositions, TeacherText, learn_openers, student_targets
from trl_reasoning_distill.teacher.store.reading import StoredRow
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary

Integers = npt.NDArray[np.int64]
_SPECIAL, _GAP = 0x10000, "\U0010ffff"
_FIRST_SYMBOL = chr(_SPECIAL)


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """The student's tokens of a row, and where each lies in the teacher's.

    Attributes:
        input_ids: The student's ids.
        labels: Its labels.
        sources: `(n,)` for each supervised position t ≥ 1 the number, within the row, of the teacher's token over exactly the same bytes,
            or −1.
        positions: The same positions by bytes; `records` are numbers within the row.
        text: The teacher's supervised tokens.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    sources: Integers
    positions: StudentPositions
    text: TeacherText


class RowAligner:
    """Makes the student's rows, finds their tokens in the teacher's, and makes their targets.

    Args:
        teacher_tokenizer: The tokenizer of the stored rows.
        student_tokenizer: The student's.
        fingerprint: The store's: how its rows were tokenized.
        student_vocab_size: Rows of the student's embedding.

    Attributes:
        student: The student's vocabulary.
        id_map: `(teacher ids,)`: teacher id to student id, −1 without a twin.
        is_one_tokenizer: Whether both cut every text alike, so that records need only other ids.
    """

    def __init__(
        self,
        teacher_tokenizer: Any,
        student_tokenizer: Any,
        fingerprint: Mapping[str, Any] | None = None,
        student_vocab_size: int | None = None,
    ) -> None:
        self._student_tokenizer = student_tokenizer
        made_with = fingerprint or {}
        self._assistant_only = bool(made_with.get("assistant_only"))
        self._template_kwargs = made_with.get("chat_template_kwargs")
        teacher, student = Vocabulary(teacher_tokenizer), Vocabulary(student_tokenizer)
        self.student = student
        self.is_one_tokenizer = teacher.cuts_as(student)
        self.id_map = map_vocabulary(teacher, student, student_vocab_size)
        self._cuts = Cuts(teacher, student, self.id_map, student_vocab_size)
        twins = {int(self.id_map[i]): i for i in teacher.special if int(self.id_map[i]) in student.special}
        same = {i for twin, i in twins.items() if teacher.special[i] == student.special[twin]}
        self._symbols = {_characters(teacher.special[i]): _symbol(int(self.id_map[i])) for i in same}
        self._teacher_pieces = _pieces(teacher, {i: _symbol(twin) for twin, i in twins.items()})
        self._student_pieces = _pieces(student, {twin: _symbol(twin) for twin in twins})

    def id_counts(self) -> dict[str, int]:
        """How many ids the teacher has, and how many of them the student has too."""
        return {"mapped_ids": int(np.count_nonzero(self.id_map >= 0)), "teacher_ids": len(self._teacher_pieces)}

    def align(self, row: StoredRow, example: Mapping[str, Any] | None) -> RowPlan:
        """Find the student's tokens of one row in the teacher's.

        Args:
            row: The teacher's row.
            example: The text it was made from; `None` if the store does not keep it.

        Raises:
            ValueError: If there is no text and the ids cannot be taken over as they are.
        """
        contents: list[str] = []
        if example is None:
            if (self.id_map[row.input_ids] != row.input_ids).any():
                raise ValueError(
                    "the student has other ids for these tokens, and the store does not keep the text to tokenize it anew. "
                    "Capture the store again with this version."
                )
            student = TokenizedExample(row.input_ids.tolist(), row.labels.tolist())
        else:
            student = tokenize_example(
                self._student_tokenizer,
                example,
                assistant_only=self._assistant_only,
                chat_template_kwargs=self._template_kwargs,
            )
            contents = self._contents(example)
        theirs = _SupervisedText.of(row.input_ids.tolist(), row.labels.tolist(), self._teacher_pieces)
        ours = _SupervisedText.of(student.input_ids, student.labels, self._student_pieces)
        starts = _starts_in(ours, _common_regions(theirs.characters, ours.characters, contents))
        return RowPlan(
            student.input_ids,
            student.labels,
            _same_spans(theirs, ours, starts),
            self._positions(theirs, ours, starts),
            self._text(theirs),
        )

    def targets(
        self,
        plans: Sequence[RowPlan],
        ids: npt.NDArray[np.integer],
        log_probs: npt.NDArray[np.floating],
        top_k: int,
        temperature: float = 1.0,
    ) -> TopKLogProbs:
        """Targets for the student's positions of some rows, from the teacher's distributions at theirs.

        Args:
            plans: From `align`.
            ids: `(r, M)` teacher ids of the rows' supervised positions, row after row; or `(V,)` with the whole vocabulary.
            log_probs: `(r, M)` at `temperature`, in nats.
            top_k: K, places of a target.
            temperature: The only one that the targets are valid at.

        Returns:
            A record per student position, row after row.
        """
        text, positions = _joined(plans)
        made, made_log_probs = student_targets(ids, log_probs, text, positions, self._cuts, top_k)
        return TopKLogProbs(made, made_log_probs, np.zeros((len(made), 1), np.float32), (temperature,))

    def learn(
        self, plans: Sequence[RowPlan], ids: npt.NDArray[np.integer], log_probs: npt.NDArray[np.floating]
    ) -> None:
        """Learn from some rows how often tokens that may become longer do; arguments as for `targets`."""
        learn_openers(ids, log_probs, *_joined(plans), self._cuts)

    def _text(self, theirs: _SupervisedText) -> TeacherText:
        ids, spans = theirs.ids, theirs.spans
        values = [
            b"" if special else piece.encode("latin-1")
            for special, piece in zip(self._cuts.is_special[ids], theirs.pieces, strict=True)
        ]
        continues = np.append(spans[1:, 0] == spans[:-1, 1], False)
        return TeacherText(ids, values, continues)

    def _positions(self, theirs: _SupervisedText, ours: _SupervisedText, starts: Integers) -> StudentPositions:
        """Where the student's tokens begin in the teacher's text."""
        records = np.searchsorted(theirs.spans[:, 0], starts, side="right") - 1
        usable = (starts >= 0) & (records >= 0)
        records = np.where(usable, records, 0)
        if len(theirs.ids):
            skipped = np.where(usable, starts - theirs.spans[records, 0], 0)
            usable &= (skipped == 0) | ~self._cuts.is_special[theirs.ids[records]]
            usable &= starts < theirs.spans[records, 1]
        else:
            skipped, usable = np.zeros_like(records), np.zeros(len(records), np.bool_)
        adjacent = np.append(False, ours.spans[1:, 0] == ours.spans[:-1, 1])[: len(ours.ids)]
        history = [
            b""
            if i == 0 or not adjacent[i] or ours.pieces[i - 1] >= _FIRST_SYMBOL
            else ours.pieces[i - 1].encode("latin-1")
            for i in range(len(ours.ids))
        ]
        return StudentPositions(
            np.where(usable, records, -1),
            np.where(usable, skipped, 0),
            ours.ids,
            ours.spans[:, 1] - ours.spans[:, 0],
            history,
        )

    def _contents(self, example: Mapping[str, Any]) -> list[str]:
        """The supervised texts of a row, as they stand in it whatever the template; one character per byte or shared special token."""
        value = next(example[name] for name in ("completion", "messages", "text") if name in example)
        if isinstance(value, str):
            texts = [value]
        else:
            turns = [turn for turn in value if not self._assistant_only or turn["role"] == "assistant"]
            texts = [str(turn.get("content") or "") for turn in turns]
        contents = [_characters(text) for text in texts if text.strip()]
        for text, symbol in self._symbols.items():  # a special token that is spelled out in a text becomes that token
            contents = [content.replace(text, symbol) for content in contents]
        return contents


def _joined(plans: Sequence[RowPlan]) -> tuple[TeacherText, StudentPositions]:
    """The texts and positions of rows as one."""
    firsts = np.cumsum([0, *(len(plan.text.ids) for plan in plans)])
    text = TeacherText(
        np.concatenate([plan.text.ids for plan in plans]),
        [value for plan in plans for value in plan.text.values],
        np.concatenate([plan.text.continues for plan in plans]),
    )
    each = [plan.positions for plan in plans]
    positions = StudentPositions(
        np.concatenate([np.where(p.records < 0, -1, p.records + f) for p, f in zip(each, firsts, strict=False)]),
        np.concatenate([p.skipped for p in each]),
        np.concatenate([p.ids for p in each]),
        np.concatenate([p.lengths for p in each]),
        [value for p in each for value in p.history],
    )
    return text, positions


# Text as strings with one character per byte, and one beyond U+10000 per special token --------------------------------------------


def _characters(text: str) -> str:
    """One character per byte."""
    return text.encode().decode("latin-1")


def _symbol(student_id: int) -> str:
    """The character of a special token that both vocabularies have."""
    return chr(_SPECIAL + student_id)


def _pieces(vocabulary: Vocabulary, symbols: Mapping[int, str]) -> dict[int, str]:
    """Id to the characters it stands for: a special token that both have is one symbol, any other is its text."""
    pieces = {i: value.decode("latin-1") for i, value in vocabulary.bytes_of.items()}
    pieces |= {i: _characters(text) for i, text in vocabulary.special.items()}
    return pieces | dict(symbols)


@dataclasses.dataclass(frozen=True)
class _SupervisedText:
    """The supervised tokens t ≥ 1 of a row as one string, with a mark where they are not adjacent.

    Attributes:
        characters: One per byte, shared special token or mark.
        ids: `(n,)` the tokens.
        pieces: `(n,)` the characters of each.
        spans: `(n, 2)` where each lies in `characters`.
    """

    characters: str
    ids: Integers
    pieces: list[str]
    spans: Integers

    @classmethod
    def of(cls, input_ids: Sequence[int], labels: Sequence[int], pieces: Mapping[int, str]) -> _SupervisedText:
        """The text of a row."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length, last = 0, 0
        supervised = supervised_positions(labels)
        for t in supervised:
            if t != last + 1 and parts:
                parts.append(_GAP)
                length += 1
            piece = pieces.get(input_ids[t], "")
            parts.append(piece)
            spans.append((length, length := length + len(piece)))
            last = t
        ids = [input_ids[t] for t in supervised]
        own = [pieces.get(i, "") for i in ids]
        return cls("".join(parts), np.array(ids, np.int64), own, np.array(spans, np.int64).reshape(-1, 2))


def _starts_in(ours: _SupervisedText, regions: Iterator[tuple[int, int, int]]) -> Integers:
    """Where each of the student's tokens begins in the teacher's text; −1 where it does not stand there."""
    starts = np.full(len(ours.ids), -1, np.int64)
    for teacher_start, student_start, length in regions:
        start, stop = ours.spans.T
        inside = (student_start <= start) & (stop <= student_start + length) & (start < stop)
        starts[inside] = start[inside] + (teacher_start - student_start)
    return starts


def _same_spans(theirs: _SupervisedText, ours: _SupervisedText, starts: Integers) -> Integers:
    """For each of the student's tokens the number of the teacher's over exactly the same bytes, −1 where there is none."""
    record_of = {span: number for number, span in enumerate(map(tuple, theirs.spans.tolist())) if span[0] < span[1]}
    lengths = (ours.spans[:, 1] - ours.spans[:, 0]).tolist()
    return np.array(
        [
            record_of.get((start, start + length), -1) if start >= 0 else -1
            for start, length in zip(starts.tolist(), lengths, strict=True)
        ],
        np.int64,
    )


def _common_regions(one: str, other: str, contents: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Stretches that stand in both texts, in order: `(start in one, start in other, length)`.

    Templates wrap the same contents differently. So each content is looked up in both, and the match is then extended as far as the
    two agree. Where a template changed the content, what the texts have in common at their beginning and end is left.
    """
    at, at_other, found = 0, 0, False
    for content in contents:
        for text in (content, content.strip()):
            start, start_other = one.find(text, at), other.find(text, at_other)
            if start < 0 or start_other < 0:
                continue
            before = _common_length(one[at:start][::-1], other[at_other:start_other][::-1])
            stop, stop_other = start + len(text), start_other + len(text)
            after = _common_length(one[stop:], other[stop_other:])
            yield start - before, start_other - before, before + len(text) + after
            at, at_other, found = stop, stop_other, True
            break
    if not found:
        prefix = _common_length(one, other)
        suffix = min(_common_length(one[::-1], other[::-1]), len(one) - prefix, len(other) - prefix)
        yield 0, 0, prefix
        yield len(one) - suffix, len(other) - suffix, suffix


def _common_length(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    for length, (mine, others) in enumerate(zip(one, other, strict=False)):
        if mine != others:
            return length
    return min(len(one), len(other))
