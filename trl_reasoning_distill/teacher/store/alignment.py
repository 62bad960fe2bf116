"""The teacher's vocabulary and positions become the student's.

Two steps, and for one tokenizer both do nothing but drop ids that only pad an embedding:

- **Vocabulary.** Teacher ids turn into the student ids of the same bytes; special tokens go by text or role. An id without a twin
  is dropped from the record. Its mass stays in the tail, where it belongs: the log-sum-exp does not change.
- **Positions.** The student's tokens are made from the same text, with its own template. A student token gets the teacher's record
  if the teacher has a token over exactly the same bytes of the same text: then both were asked the same question, and the
  answer that was given is a token for both. All other tokens get an empty record, and thus no distillation loss.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from trl_reasoning_distill.data.tokenization import (
    chat_template_fingerprint,
    supervised_positions,
    tokenize_example,
    tokenizer_fingerprint,
)
from trl_reasoning_distill.hub import load_tokenizer
from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs
from trl_reasoning_distill.teacher.store import StoredRow, TopKStore, TopKStoreWriter
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary

Ids = npt.NDArray[np.int32]
_SPECIAL, _GAP = 0x10000, "\U0010ffff"


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """What an alignment kept.

    Attributes:
        store: The aligned store.
        positions: Supervised positions of the student.
        kept_positions: How many of them have a record that is not empty.
        teacher_mass: Mean mass of the teacher's Top-M tokens at the positions with a record, before ids were mapped.
        kept_mass: Mean mass of what is left of them.
        mapped_ids: Teacher ids that have a twin.
        teacher_ids: Teacher ids.
    """

    store: TopKStore | None = dataclasses.field(compare=False)
    positions: int
    kept_positions: int
    teacher_mass: float
    kept_mass: float
    mapped_ids: int
    teacher_ids: int

    @property
    def kept_share(self) -> float:
        """Share of the student's supervised positions that have a record."""
        return self.kept_positions / max(1, self.positions)


def align_store(
    store: TopKStore | str | os.PathLike[str],
    student_tokenizer: Any,
    output: str | os.PathLike[str],
    *,
    teacher_tokenizer: Any = None,
    top_k: int | None = None,
    student_vocab_size: int | None = None,
    progress: bool = False,
) -> AlignmentReport:
    """Write a store for a student from the store of a teacher with another vocabulary or tokenizer.

    Args:
        store: The teacher's store, or its folder.
        student_tokenizer: The student's tokenizer, with the chat template that it will be trained with.
        output: Folder of the new store.
        teacher_tokenizer: The tokenizer that the store was captured with; default: loaded from where the teacher was.
        top_k: Tokens kept per record; default: as many as the teacher's store has.
        student_vocab_size: Rows of the student's embedding; ids beyond it are dropped.
        progress: Show a progress bar.

    Raises:
        ValueError: If the store is aligned already or was captured with another tokenizer, if rows have to be tokenized again but the
            store does not keep their text, or if no position is left.
    """
    store = store if isinstance(store, TopKStore) else TopKStore.open(store)
    if store.manifest["aligned_to"]:
        raise ValueError(f"The store at {store.path} is aligned already. Align the teacher's own store.")
    teacher_tokenizer = teacher_tokenizer or load_tokenizer(
        store.tokenizer_name, advice="It is the teacher's: give it as teacher_tokenizer."
    )
    store.check_compatible(
        {"tokenizer": tokenizer_fingerprint(teacher_tokenizer)},
        remedy="Give the tokenizer that the store was captured with.",
    )
    top_k = min(top_k or store.top_k, store.top_k)
    aligner = RowAligner(teacher_tokenizer, student_tokenizer, store.fingerprint, student_vocab_size)
    tally = _Tally()
    with TopKStoreWriter(
        output,
        top_k=top_k,
        temperatures=store.temperatures,
        fingerprint=store.fingerprint,
        encoding=store.manifest["encoding"],
    ) as writer:
        for number, row in tqdm(enumerate(store), total=store.rows, unit="row", desc="align", disable=not progress):
            example = store.example(number)
            try:
                input_ids, labels, sources = aligner.align(row, example)
            except ValueError as error:
                raise ValueError(f"{store.path}, row {number}: {error}") from None
            records = store.read(np.where(sources >= 0, row.offset + sources, 0))
            moved = move_records(records, sources >= 0, aligner.id_map, top_k)
            tally.add(records, moved)
            writer.add(input_ids, labels, moved, example)
        if not tally.kept_positions:
            raise ValueError(
                f"No position of {store.path} has a record after alignment: no token of teacher and student covers the same bytes. "
                f"Is {getattr(student_tokenizer, 'name_or_path', 'this')} the student's tokenizer?"
            )
        report = AlignmentReport(None, **tally.means(), **aligner.id_counts())
        writer.aligned_to = {
            "student": getattr(student_tokenizer, "name_or_path", None),
            "tokenizer": tokenizer_fingerprint(student_tokenizer),
            "chat_template": chat_template_fingerprint(student_tokenizer),
            "vocab_size": student_vocab_size,
            **{name: value for name, value in dataclasses.asdict(report).items() if name != "store"},
        }
    return dataclasses.replace(report, store=TopKStore.open(output))


class RowAligner:
    """Makes the student's rows, and says which record of the teacher's belongs to which of their tokens.

    Args:
        teacher_tokenizer: The tokenizer of the stored rows.
        student_tokenizer: The student's.
        fingerprint: The store's: how its rows were tokenized.
        student_vocab_size: Rows of the student's embedding.

    Attributes:
        id_map: `(teacher ids,)`: teacher id to student id, −1 without a twin.
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
        self.id_map = map_vocabulary(teacher, student, student_vocab_size)
        twins = {int(self.id_map[i]): i for i in teacher.special if int(self.id_map[i]) in student.special}
        same = {i for twin, i in twins.items() if teacher.special[i] == student.special[twin]}
        self._symbols = {_characters(teacher.special[i]): _symbol(int(self.id_map[i])) for i in same}
        self._teacher_pieces = _pieces(teacher, {i: _symbol(twin) for twin, i in twins.items()})
        self._student_pieces = _pieces(student, {twin: _symbol(twin) for twin in twins})

    def id_counts(self) -> dict[str, int]:
        """How many ids the teacher has, and how many of them the student has too."""
        return {"mapped_ids": int(np.count_nonzero(self.id_map >= 0)), "teacher_ids": len(self._teacher_pieces)}

    def align(
        self, row: StoredRow, example: Mapping[str, Any] | None
    ) -> tuple[Sequence[int], Sequence[int], npt.NDArray[np.int64]]:
        """Align one row.

        Args:
            row: The teacher's row.
            example: The text it was made from; `None` if the store does not keep it.

        Returns:
            The student's ids and labels, and for each of its supervised positions t ≥ 1 the number, within the row, of the teacher's
            record, or −1.

        Raises:
            ValueError: If there is no text and the ids cannot be taken over as they are.
        """
        if example is None:
            mapped = self.id_map[row.input_ids]
            if (mapped != row.input_ids).any():
                raise ValueError(
                    "the student has other ids for these tokens, and the store does not keep the text to tokenize it anew. "
                    "Capture the store again with this version."
                )
            return row.input_ids.tolist(), row.labels.tolist(), np.arange(row.count)
        student = tokenize_example(
            self._student_tokenizer,
            example,
            assistant_only=self._assistant_only,
            chat_template_kwargs=self._template_kwargs,
        )
        teacher_text, teacher_spans = _supervised_text(
            row.input_ids.tolist(), row.labels.tolist(), self._teacher_pieces
        )
        student_text, student_spans = _supervised_text(student.input_ids, student.labels, self._student_pieces)
        record_of = {span: number for number, span in enumerate(teacher_spans) if span[0] < span[1]}
        sources = np.full(len(student_spans), -1, np.int64)
        regions = list(_common_regions(teacher_text, student_text, self._contents(example)))
        for number, (start, stop) in enumerate(student_spans):
            for teacher_start, student_start, length in regions:
                if student_start <= start and stop <= student_start + length:
                    shift = teacher_start - student_start
                    sources[number] = record_of.get((start + shift, stop + shift), -1)
        return student.input_ids, student.labels, sources

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


def move_records(records: TopKLogProbs, has_record: npt.NDArray[np.bool_], id_map: Ids, top_k: int) -> TopKLogProbs:
    """Records in the student's ids: without a twin an id is dropped and its mass is left to the tail; the K most likely stay.

    Args:
        records: Teacher records, one per student position.
        has_record: `(n,)`; where false, the result is an empty record.
        id_map: Teacher id to student id, −1 without a twin.
        top_k: K, at most as many as the records have.
    """
    ids = np.where(records.ids == MISSING_ID, MISSING_ID, id_map[records.ids])
    ids[~has_record] = MISSING_ID
    order = np.argsort(ids == MISSING_ID, axis=1, kind="stable")[
        :, :top_k
    ]  # what is left keeps its order, the gaps go last
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.where(ids == MISSING_ID, -np.inf, np.take_along_axis(records.log_probs, order, axis=1))
    kept = np.zeros(records.ids.shape, np.bool_)
    np.put_along_axis(kept, order, ids != MISSING_ID, axis=1)
    tails = (records.tail_outside(kept, temperature) for temperature in records.temperatures)
    known = [tail for tail in tails if tail is not None]
    return TopKLogProbs(
        ids.astype(np.int32),
        log_probs.astype(np.float32),
        records.log_sum_exp,
        records.temperatures,
        np.stack(known, axis=1) if known else None,
    )


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


def _supervised_text(
    input_ids: Sequence[int], labels: Sequence[int], pieces: Mapping[int, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The supervised tokens t ≥ 1 as one string, with a mark where they are not adjacent, and the span of each in it."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length, last = 0, 0
    for t in supervised_positions(labels):
        if t != last + 1 and parts:
            parts.append(_GAP)
            length += 1
        piece = pieces.get(input_ids[t], "")
        parts.append(piece)
        spans.append((length, length := length + len(piece)))
        last = t
    return "".join(parts), spans


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


@dataclasses.dataclass
class _Tally:
    """Sums over what an alignment kept."""

    positions: int = 0
    kept_positions: int = 0
    teacher_mass: float = 0.0
    kept_mass: float = 0.0

    def add(self, before: TopKLogProbs, after: TopKLogProbs) -> None:
        kept = after.ids[:, 0] != MISSING_ID
        self.positions += len(kept)
        self.kept_positions += int(kept.sum())
        self.teacher_mass += float(np.exp(before.log_probs[kept], dtype=np.float64).sum())
        self.kept_mass += float(np.exp(after.log_probs[kept], dtype=np.float64).sum())

    def means(self) -> dict[str, Any]:
        kept = max(1, self.kept_positions)
        means = {"teacher_mass": self.teacher_mass / kept, "kept_mass": self.kept_mass / kept}
        return {"positions": self.positions, "kept_positions": self.kept_positions, **means}
