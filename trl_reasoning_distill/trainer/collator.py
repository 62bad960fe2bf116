"""Batches with per-token columns beside TRL's own, and the teacher's targets read from the store.

TRL's collator pads or flattens `input_ids` and `labels`; the collators here wrap it and lay out every further column in the same
way, so that entry `[b, t]` of each belongs to the token at `[b, t]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
from trl_reasoning_distill.teacher.store import TopKStore

KD_INDEX = "kd_index"
KD_IDS = "kd_ids"
KD_LOG_PROBS = "kd_log_probs"


class TokenColumnsCollator:
    """TRL's collator, and further per-token columns.

    Args:
        base: TRL's collator, which pads on the right or, with `padding_free`, lays the rows end to end.
        columns: Name of each further column, and what it holds where there is no supervised token.
    """

    def __init__(self, base: DataCollatorForLanguageModeling, columns: Mapping[str, float]) -> None:
        self.base, self.columns = base, dict(columns)

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
            batch[name] = column.masked_fill(labels == IGNORE_INDEX, fill)
        return batch


class TopKCollator(TokenColumnsCollator):
    """The teacher's targets for each supervised token, found by the number of its record in the store.

    Adds `kd_ids (batch, length, k)` int64, −1 where there is none, and `kd_log_probs (batch, length, k)` float32 at `temperature`.

    Args:
        base: TRL's collator.
        columns: Further per-token columns; `kd_index` must be among them.
        store: Where the records lie.
        top_k: Places per position that are used.
        temperature: Temperature of the log-probabilities; one that the store holds.
        vocab_size: Rows of the student's embedding. An id beyond them has no logit in the student; its mass goes to the tail.
    """

    def __init__(
        self,
        base: DataCollatorForLanguageModeling,
        columns: Mapping[str, float],
        *,
        store: TopKStore,
        top_k: int,
        temperature: float,
        vocab_size: int,
    ) -> None:
        super().__init__(base, columns)
        self.store, self.top_k, self.temperature, self.vocab_size = store, top_k, temperature, vocab_size

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `TokenColumnsCollator.__call__`."""
        batch = super().__call__(examples)
        batch[KD_IDS], batch[KD_LOG_PROBS] = self._targets(batch[KD_INDEX])
        return batch

    def _targets(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.full((*index.shape, self.top_k), -1)
        log_probs = torch.full(ids.shape, -torch.inf)
        has_target = index >= 0
        records = self.store.read(index[has_target].numpy())
        kept = records.ids[:, : self.top_k].astype(np.int64)
        at_temperature = records.at_temperature(self.temperature)[:, : self.top_k]
        lost = (kept < 0) | (kept >= self.vocab_size)
        ids[has_target] = torch.from_numpy(np.where(lost, -1, kept))
        log_probs[has_target] = torch.from_numpy(np.where(lost, -np.inf, at_temperature).astype(np.float32))
        return ids, log_probs
