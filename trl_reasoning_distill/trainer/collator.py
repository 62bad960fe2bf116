"""Batches with per-token columns beside TRL's own, and distributions read from a store.

TRL's collator pads or flattens `input_ids` and `labels`; the collator here wraps it and lays out every further column in the same
way, so that entry `[b, t]` of each belongs to the token at `[b, t]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
from trl_reasoning_distill.trainer.targets import StoredTargets

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
        base: DataCollatorForLanguageModeling,
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
            batch[name] = column.masked_fill(labels == IGNORE_INDEX, fill)
        for targets in self.targets:
            batch.update(targets.read(batch[targets.index], self.vocab_size))
        return batch
