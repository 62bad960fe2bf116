"""The teacher's vocabulary and positions become the student's.

- **One tokenizer.** Teacher ids turn into the student ids of the same bytes; special tokens go by text or role. An id without a twin, such
  as one that only pads an embedding, is dropped from the record. Its mass stays in the tail, where it belongs: the log-sum-exp does not
  change.
- **Two tokenizers.** The student's tokens are made from the same text, with its own template, and the teacher's distributions become
  distributions over them, given the same bytes (`marginals.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from trl_reasoning_distill.data.tokenization import (
    chat_template_fingerprint,
    tokenizer_fingerprint,
)
from trl_reasoning_distill.hub import load_tokenizer
from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs, temperature_index
from trl_reasoning_distill.teacher.store import StoredRow, TopKStore, TopKStoreWriter
from trl_reasoning_distill.teacher.store.coverage import ALL, Coverage, CoverageTally
from trl_reasoning_distill.teacher.store.matching import RowAligner, RowPlan

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
_BATCH = 4096
"""Positions that are aligned at once."""
_LEARN_ROWS = 256
"""Rows to learn from how often tokens that may become longer do."""


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """What an alignment kept.

    Attributes:
        store: The aligned store.
        positions: Supervised positions of the student.
        kept_positions: How many of them have a record that is not empty.
        teacher_mass: Mean mass of the teacher's Top-M tokens at the positions with a record.
        kept_mass: Mean mass of the student's tokens there.
        mapped_ids: Teacher ids that have a twin.
        teacher_ids: Teacher ids.
        temperatures: The temperatures that the aligned store can be trained at; one only between two tokenizers.
        coverage: Positions and mass by class of token (`coverage.CLASSES`).
    """

    store: TopKStore | None = dataclasses.field(compare=False)
    positions: int
    kept_positions: int
    teacher_mass: float
    kept_mass: float
    mapped_ids: int
    teacher_ids: int
    temperatures: tuple[float, ...]
    coverage: dict[str, Coverage]

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
    temperature: float | None = None,
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
        temperature: Between two tokenizers, the one that the student will be trained at; default: the highest that the store has. With one
            tokenizer the new store has all that the old one has.
        student_vocab_size: Rows of the student's embedding; ids beyond it are dropped.
        progress: Show a progress bar.

    Raises:
        ValueError: If the store is aligned already or was captured with another tokenizer or without that temperature, if rows have to be
            tokenized again but the store does not keep their text, or if no position is left.
    """
    store = store if isinstance(store, TopKStore) else TopKStore.open(store)
    aligner = StoreAligner(store, student_tokenizer, teacher_tokenizer, student_vocab_size, top_k, temperature)
    with TopKStoreWriter(
        output,
        top_k=aligner.top_k,
        temperatures=aligner.temperatures,
        fingerprint=store.fingerprint,
        encoding=store.manifest["encoding"],
    ) as writer:
        with tqdm(total=store.rows, unit="row", desc="align", disable=not progress) as bar:
            for row in aligner.rows(range(store.rows)):
                writer.add(row.input_ids, row.labels, row.records, row.example)
                bar.update()
        report = aligner.report()
        if not report.kept_positions:
            raise ValueError(
                f"No position of {store.path} has a record after alignment: teacher and student share no text. "
                f"Is {getattr(student_tokenizer, 'name_or_path', 'this')} the student's tokenizer?"
            )
        writer.aligned_to = {
            "student": getattr(student_tokenizer, "name_or_path", None),
            "tokenizer": tokenizer_fingerprint(student_tokenizer),
            "chat_template": chat_template_fingerprint(student_tokenizer),
            "vocab_size": student_vocab_size,
            **{name: value for name, value in dataclasses.asdict(report).items() if name != "store"},
        }
    return dataclasses.replace(report, store=TopKStore.open(output))


@dataclasses.dataclass(frozen=True)
class AlignedRow:
    """A row of the student's tokens with the records of its supervised positions."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    records: TopKLogProbs
    example: dict[str, Any] | None


class _Planned(NamedTuple):
    row: StoredRow
    example: dict[str, Any] | None
    plan: RowPlan


class StoreAligner:
    """Aligns rows of a store, and counts what is kept. Arguments and errors are those of `align_store`.

    Attributes:
        top_k: K, places of a record.
        temperatures: Those of the aligned records.
    """

    def __init__(
        self,
        store: TopKStore,
        student_tokenizer: Any,
        teacher_tokenizer: Any = None,
        student_vocab_size: int | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
    ) -> None:
        if store.manifest["aligned_to"]:
            raise ValueError(f"The store at {store.path} is aligned already. Align the teacher's own store.")
        teacher_tokenizer = teacher_tokenizer or load_tokenizer(
            store.tokenizer_name, advice="It is the teacher's: give it as teacher_tokenizer."
        )
        store.check_compatible(
            {"tokenizer": tokenizer_fingerprint(teacher_tokenizer)},
            remedy="Give the tokenizer that the store was captured with.",
        )
        self._store = store
        self._aligner = RowAligner(teacher_tokenizer, student_tokenizer, store.fingerprint, student_vocab_size)
        self.top_k = min(top_k or store.top_k, store.top_k)
        if temperature is not None:
            temperature = store.temperatures[temperature_index(store.temperatures, temperature)]
        one = (max(store.temperatures) if temperature is None else temperature,)
        self.temperatures = store.temperatures if self._aligner.is_one_tokenizer else one
        self._coverage = CoverageTally(self._aligner.student)
        self._teacher_mass = 0.0

    def rows(self, numbers: Sequence[int]) -> Iterator[AlignedRow]:
        """The rows of these numbers, aligned."""
        if not self._aligner.is_one_tokenizer:
            self._learn()
        for batch in self._batches(numbers):
            yield from self._move(batch) if self._aligner.is_one_tokenizer else self._make_targets(batch)

    def _learn(self) -> None:
        """Learn from rows spread over the store, the same ones whatever is aligned, how often tokens that may become longer do."""
        count = self._store.rows
        for batch in self._batches(sorted({i * count // _LEARN_ROWS for i in range(_LEARN_ROWS)})):
            plans, ids, log_probs = self._distributions(batch)
            self._aligner.learn(plans, ids, log_probs)

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[_Planned]]:
        batch: list[_Planned] = []
        for number in numbers:
            row, example = self._store.row(number), self._store.example(number)
            try:
                batch.append(_Planned(row, example, self._aligner.align(row, example)))
            except ValueError as error:
                raise ValueError(f"{self._store.path}, row {number}: {error}") from None
            if sum(len(one.plan.sources) for one in batch) >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _distributions(self, batch: Sequence[_Planned]) -> tuple[list[RowPlan], Ids, Floats]:
        records = self._store.read(np.concatenate([np.arange(o.row.offset, o.row.offset + o.row.count) for o in batch]))
        return [one.plan for one in batch], records.ids, records.at_temperature(self.temperatures[0])

    def _move(self, batch: Sequence[_Planned]) -> Iterator[AlignedRow]:
        """One tokenizer: a record gets other ids."""
        for one in batch:
            has_record = one.plan.sources >= 0
            records = self._store.read(np.where(has_record, one.row.offset + one.plan.sources, 0))
            moved = move_records(records, has_record, self._aligner.id_map, self.top_k)
            yield self._counted(one, records.log_probs, moved)

    def _make_targets(self, batch: Sequence[_Planned]) -> Iterator[AlignedRow]:
        """Two tokenizers: distributions over other events."""
        plans, ids, log_probs = self._distributions(batch)
        targets = self._aligner.targets(plans, ids, log_probs, self.top_k, self.temperatures[0])
        start = first = 0
        for one in batch:
            stop = start + len(one.plan.sources)
            before = log_probs[first + np.maximum(one.plan.positions.records, 0)]
            yield self._counted(one, before, targets.take(slice(start, stop)))
            start, first = stop, first + one.row.count

    def _counted(self, one: _Planned, before: Floats, after: TopKLogProbs) -> AlignedRow:
        kept = after.ids[:, 0] != MISSING_ID
        self._teacher_mass += float(np.exp(before[kept], dtype=np.float64).sum())
        self._coverage.add(one.plan.positions.ids, after.ids, after.log_probs)
        return AlignedRow(one.plan.input_ids, one.plan.labels, after, one.example)

    def report(self) -> AlignmentReport:
        """What was kept of the rows so far; without a store."""
        coverage = self._coverage.by_class()
        total = coverage[ALL]
        return AlignmentReport(
            store=None,
            positions=total.positions,
            kept_positions=total.kept_positions,
            teacher_mass=self._teacher_mass / max(1, total.kept_positions),
            kept_mass=total.mass,
            temperatures=self.temperatures,
            coverage=coverage,
            **self._aligner.id_counts(),
        )


def move_records(records: TopKLogProbs, has_record: npt.NDArray[np.bool_], id_map: Ids, top_k: int) -> TopKLogProbs:
    """Records in the student's ids: without a twin an id is dropped and its mass is left to the tail; the K most likely stay.

    Args:
        records: Teacher records, one per student position.
        has_record: `(n,)`; where false, the result is an empty record.
        id_map: Teacher id to student id, −1 without a twin.
        top_k: K, at most as many as the records have.
    """
    known = (records.ids != MISSING_ID) & (records.ids < len(id_map))  # beyond them an embedding is only padded
    ids = np.where(known & has_record[:, None], id_map[np.where(known, records.ids, 0)], MISSING_ID)
    # What is left keeps its order, the gaps go last.
    order = np.argsort(ids == MISSING_ID, axis=1, kind="stable")[:, :top_k]
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.where(ids == MISSING_ID, -np.inf, np.take_along_axis(records.log_probs, order, axis=1))
    kept = np.zeros(records.ids.shape, np.bool_)
    np.put_along_axis(kept, order, ids != MISSING_ID, axis=1)
    tails = [records.tail_outside(kept, temperature) for temperature in records.temperatures]
    summed = [tail for tail in tails if tail is not None]
    return TopKLogProbs(
        ids.astype(np.int32),
        log_probs.astype(np.float32),
        records.log_sum_exp,
        records.temperatures,
        np.stack(summed, axis=1) if summed else None,
    )
