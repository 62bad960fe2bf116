"""Distributions from a Top-K store for the tokens of a dataset: the teacher's, or those of the model as it was before training.

A row of the dataset is found in the store by the hash of its tokens. From then on each supervised token carries the number of its
record, through truncation, shuffling, packing and resumption, and the collator reads the records of a batch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, is_supervised, tokenizer_fingerprint
from trl_reasoning_distill.teacher.records import temperature_index
from trl_reasoning_distill.teacher.store import TopKStore

logger = logging.getLogger(__name__)

_OFFSET = "record_offset"


@dataclasses.dataclass(frozen=True)
class StoredTargets:
    """A store, and the columns in which its distributions travel with the tokens.

    Attributes:
        store: Where the records lie.
        top_k: Places per position that are used.
        temperature: Temperature of the log-probabilities; one that the store holds.
        index: Name of the per-token column with the number of the record, −1 where there is none.
        ids: Name of the batch's column `(batch, length, k)` of ids, −1 where there is none.
        log_probs: Name of the batch's column `(batch, length, k)` of log-probabilities.
        owner: Whose distributions they are, for messages.
        log_tail: Name of the batch's column `(batch, length)` of the log of the mass outside these ids; empty for none. Forward KL does
            without it: it weighs the tail by its mass, which the log-probabilities tell.
    """

    store: TopKStore
    top_k: int
    temperature: float
    index: str
    ids: str
    log_probs: str
    owner: str
    log_tail: str = ""

    def __post_init__(self) -> None:
        try:
            temperature_index(self.store.temperatures, self.temperature)
        except ValueError as error:
            if not self.store.manifest["aligned_to"]:
                raise
            made_for = ", ".join(f"{t:g}" for t in self.store.temperatures)
            raise ValueError(
                f"The store at {self.store.path} was aligned for T = {made_for}, and {self.owner} is asked for at T = {self.temperature:g}. "
                f"Between two tokenizers a target is a sum of probabilities, which says nothing of another temperature. Train at "
                f"T = {made_for}, or align the teacher's own store again with --temperature {self.temperature:g}."
            ) from error

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that `read` gives. A store of version 0.1.0 knows no tails; the loss then takes one minus the rest."""
        has_tail = bool(self.log_tail) and self.store.has_log_tail
        return (self.ids, self.log_probs, *((self.log_tail,) if has_tail else ()))

    def number_rows(self, rows: Dataset, name: str, tokenizer: Any, **map_kwargs: Any) -> Dataset:
        """Add the `index` column.

        Args:
            rows: With `input_ids`, `labels` and `row_hash`; whole, nothing cut or packed.
            name: The dataset's name. Rows of `"train"` must all be in the store; of another, those that are not have no target.
            tokenizer: The student's.
            map_kwargs: For `Dataset.map`.

        Raises:
            StoreError: If the store is of another vocabulary.
            ValueError: If rows to train on are not in the store.
        """
        self.store.check_compatible(
            {"tokenizer": tokenizer_fingerprint(tokenizer)},
            remedy="Its ids are of another vocabulary than the student's. Run `trl-distill align` on it with the student's tokenizer first.",
        )
        if self._are_numbered(rows):
            return rows
        offsets = [self._find_offset(digest) for digest in rows["row_hash"]]
        self._refuse_missing(offsets, name, tokenizer)
        rows = rows.remove_columns([self.index] if self.index in rows.column_names else [])
        return rows.add_column(_OFFSET, offsets).map(
            _number_tokens, fn_kwargs={"column": self.index}, remove_columns=[_OFFSET], **map_kwargs
        )

    def read(self, index: Tensor, vocab_size: int) -> dict[str, Tensor]:
        """The columns of a batch that `columns` names.

        Args:
            index: `(batch, length)`, numbers of records.
            vocab_size: Rows of the student's embedding. An id beyond them has no logit in the student; its mass goes to the tail.
        """
        ids = torch.full((*index.shape, self.top_k), -1)
        log_probs = torch.full(ids.shape, -torch.inf)
        has_target = index >= 0
        records = self.store.read(index[has_target].numpy())
        kept = records.ids[:, : self.top_k].astype(np.int64)
        at_temperature = records.at_temperature(self.temperature)[:, : self.top_k]
        lost = (kept < 0) | (kept >= vocab_size)
        ids[has_target] = torch.from_numpy(np.where(lost, -1, kept))
        log_probs[has_target] = torch.from_numpy(np.where(lost, -np.inf, at_temperature).astype(np.float32))
        columns = {self.ids: ids, self.log_probs: log_probs}
        if self.log_tail in self.columns:
            is_kept = np.zeros(records.ids.shape, np.bool_)
            is_kept[:, : self.top_k] = ~lost
            tail = records.tail_outside(is_kept, self.temperature)
            columns[self.log_tail] = torch.zeros(index.shape)
            columns[self.log_tail][has_target] = torch.from_numpy(tail)
        return columns

    def _are_numbered(self, rows: Dataset) -> bool:
        """Whether the rows carry this store's numbers already, as those of `store.dataset()` do, and not those of another store."""
        if self.index not in rows.column_names:
            return False
        known = {(row.hash, row.offset) for row in self.store}
        first = [min((number for number in index if number >= 0), default=-1) for index in rows[self.index]]
        return all(pair in known for pair in zip(rows["row_hash"], first, strict=True))

    def _find_offset(self, digest: str) -> int:
        number = self.store.find_row(digest)
        return -1 if number is None else self.store.row(number).offset

    def _refuse_missing(self, offsets: list[int], name: str, tokenizer: Any) -> None:
        missing = [index for index, offset in enumerate(offsets) if offset < 0]
        if not missing:
            return
        if name != "train":
            text = "%d of %d rows of the %s dataset are not in the store of %s: no loss against it for them"
            logger.info(text, len(missing), len(offsets), name, self.owner)
            return
        template = chat_template_fingerprint(tokenizer)
        different = self.store.differences({"chat_template": template}) or [
            "the tokenizer and chat template are the same, so the texts differ"
        ]
        raise ValueError(
            f"The store at {self.store.path} was not made for these tokens: {len(missing):,} of {len(offsets):,} rows of the train dataset "
            f"are not in it, the first is row {missing[0]}; {'; '.join(different)}. Capture {self.owner} on this dataset, or train on the "
            "store's own rows (`store.dataset()`)."
        )


def _number_tokens(row: dict[str, Any], column: str) -> dict[str, list[int]]:
    """The record's number of each supervised token but the first of the row, which nothing predicts; −1 elsewhere."""
    index, record = [], row[_OFFSET]
    for position, label in enumerate(row["labels"]):
        has_record = record >= 0 and position > 0 and is_supervised(label)
        index.append(record if has_record else -1)
        record += has_record
    return {column: index}


KD_INDEX = "kd_index"
KD_IDS = "kd_ids"
KD_LOG_PROBS = "kd_log_probs"
KD_LOG_TAIL = "kd_log_tail"


class TokenColumnsCollator:
    """TRL's collator, and further per-token columns.

    Args:
        base: TRL's collator, which pads on the right or, with `padding_free`, lays the rows end to end.
        columns: Name of each further column, and what it holds where there is no supervised token.
        targets: Stores to read from; the `index` of each must be among `columns`. Adds the columns that `StoredTargets.read` names.
        vocab_size: Rows of the student's embedding, for `targets`.
    """

    def __init__(
        self,
        base: Any,
        columns: Mapping[str, float],
        targets: Sequence[StoredTargets] = (),
        vocab_size: int = 0,
    ) -> None:
        self.base, self.columns = base, dict(columns)
        self.targets, self.vocab_size = tuple(targets), vocab_size

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of TRL's columns, each `(batch, length)`, and ours."""
        batch = self.base(examples)
        labels = batch["labels"]
        for name, fill in self.columns.items():
            rows = [torch.as_tensor(example[name]) for example in examples]
            if getattr(self.base, "padding_free", False):
                rows = [torch.cat(rows)]
            column = torch.full(labels.shape, fill, dtype=torch.long if isinstance(fill, int) else torch.float32)
            for target, row in zip(column, rows, strict=True):
                target[: len(row)] = row
            # Also where the collator took a label away: the first token of each row in a flattened batch
            batch[name] = column.masked_fill(~is_supervised(labels), fill)
        for targets in self.targets:
            batch.update(targets.read(batch[targets.index], self.vocab_size))
        return batch
