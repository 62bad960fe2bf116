"""The student's completions and the teacher's log-probabilities for them, kept as a Top-K store for later offline runs.

Each rank writes what it has at every checkpoint, as a small store of its own; at the end the main process appends them all, in order, to
`store/`. So a run that is killed and resumed holds each completion once, and one folder can collect over several runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, is_supervised, tokenizer_fingerprint
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearTeacher
from trl_reasoning_distill.losses.topk import exact_top_k
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store import TopKStore, TopKStoreWriter

_ROWS = 512  # of hidden states whose logits are made at a time


class RolloutStore(TrainerCallback):
    """Collects rows with their records, and writes them when checkpoints are.

    Args:
        path: Folder for `parts/` and `store/`.
        accelerator: Of the run.
        top_k: Places per record.
        temperatures: Temperatures of the log-sum-exp, 1.0 among them.
        fingerprint: What makes the records.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        *,
        top_k: int,
        temperatures: Sequence[float],
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.path, self.accelerator = Path(path), accelerator
        self.temperatures = tuple(sorted({1.0, *temperatures}))
        self._settings = {"top_k": top_k, "temperatures": self.temperatures, "fingerprint": dict(fingerprint)}
        self._rows: list[tuple[list[int], list[int], TopKLogProbs]] = []
        self._old: TopKStore | None = None
        if (self.path / "store" / "manifest.json").exists():
            self._old = TopKStore.open(self.path / "store")
            self._old.check_compatible(fingerprint, remedy="Give another refresh_store.")
            if (self._old.top_k, self._old.temperatures) != (top_k, self.temperatures):
                raise ValueError(
                    f"The store at {self._old.path} holds Top-{self._old.top_k} at {self._old.temperatures}; this run would add Top-{top_k} at "
                    f"{self.temperatures}. Set refresh_top_k and kd_temperature alike, or give another refresh_store."
                )

    @property
    def top_k(self) -> int:
        """Places per record."""
        return int(self._settings["top_k"])  # type: ignore[call-overload]

    def add(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, targets: LinearTeacher | TopKTargets
    ) -> None:
        """Take the rows of a micro-batch.

        Args:
            input_ids: `(batch, length)`, padded on the right.
            attention_mask: The same shape.
            labels: The same shape.
            targets: The teacher's distributions for `labels[:, 1:]`, flat.
        """
        asked = is_supervised(labels[:, 1:])
        records = records_of(targets, asked.flatten(), self.top_k, self.temperatures)
        start = 0
        rows = zip(
            input_ids.tolist(), labels.tolist(), attention_mask.sum(1).tolist(), asked.sum(1).tolist(), strict=True
        )
        for ids, its_labels, length, count in rows:
            if count:
                self._rows.append((ids[:length], its_labels[:length], records.take(slice(start, start + count))))
            start += count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget parts that are newer than the checkpoint: their steps are taken again."""
        if self.accelerator.is_main_process:
            for part in self._parts():
                if int(part.name.partition("-")[0]) > state.global_step:
                    shutil.rmtree(part)
        self.accelerator.wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what there is."""
        self._flush(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what there is and append all parts to the store; after a stop in mid-training, only the former."""
        self._flush(state.global_step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and state.global_step >= state.max_steps:
            self._append()
        self.accelerator.wait_for_everyone()

    def _flush(self, step: int) -> None:
        if not self._rows:
            return
        folder = self.path / "parts" / f"{step:08d}-{self.accelerator.process_index:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        with TopKStoreWriter(folder, encoding="lossless", **self._settings) as writer:  # type: ignore[arg-type]
            for row in self._rows:
                writer.add(*row)
        self._rows = []

    def _append(self) -> None:
        parts = [TopKStore.open(part) for part in self._parts()]
        if not parts:
            return
        partial = self.path / ".store.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with TopKStoreWriter(partial, **self._settings) as writer:  # type: ignore[arg-type]
            for store in [*([] if self._old is None else [self._old]), *parts]:
                for row in store:
                    records = store.read(np.arange(row.offset, row.offset + row.count))
                    writer.add(row.input_ids.tolist(), row.labels.tolist(), records)
        self._old = None
        shutil.rmtree(self.path / "store", ignore_errors=True)
        os.replace(partial, self.path / "store")
        shutil.rmtree(self.path / "parts")

    def _parts(self) -> list[Path]:
        """Finished parts, by step and rank."""
        return sorted(path.parent for path in (self.path / "parts").glob("*/manifest.json"))


def make_rollout_store(trainer: Any, path: str) -> RolloutStore:
    """A store with the settings of a GKD trainer. A server's records are no wider than what it is asked for."""
    args = trainer.args
    is_server = args.teacher_server_url is not None
    return RolloutStore(
        Path(path),
        trainer.accelerator,
        top_k=min(args.refresh_top_k, args.kd_top_k) if is_server else min(args.refresh_top_k, trainer.shared_ids),
        temperatures=[args.kd_temperature],
        fingerprint={
            "engine": "gkd",
            "teacher": args.teacher_model_name_or_path or type(trainer.teacher).__name__,
            "teacher_context": args.teacher_context,
            "tokenizer": tokenizer_fingerprint(trainer.tokenizer),
            "chat_template": chat_template_fingerprint(trainer.tokenizer),
        },
    )


@torch.no_grad()
def records_of(
    targets: LinearTeacher | TopKTargets, asked: Tensor, top_k: int, temperatures: Sequence[float]
) -> TopKLogProbs:
    """The teacher's records of the tokens that are `asked` `(tokens,)`, in order."""
    if isinstance(targets, TopKTargets):
        kept = targets[asked.nonzero()[:, 0]]
        ids, log_probs = kept.ids[:, :top_k].cpu(), kept.log_probs[:, :top_k].float().cpu()
        return TopKLogProbs(ids.int().numpy(), log_probs.numpy(), np.zeros((len(ids), 1), np.float32), (1.0,))
    head = targets.head
    shared = targets.vocab_size or len(targets.weight)
    head = head.first(shared, targets.hidden.dtype)
    parts = [TopKLogProbs.empty(top_k, temperatures)]
    for hidden in targets.hidden[asked.to(targets.hidden.device)].split(_ROWS):
        logits = head.logits(hidden).float()
        lse = torch.stack([(logits / t).logsumexp(-1) for t in temperatures], -1)
        one = lse[:, list(temperatures).index(1.0)]
        values, ids = exact_top_k(logits, top_k)
        values = values - one[:, None]
        shift = one[:, None] / torch.tensor(temperatures, device=lse.device)
        parts.append(
            TopKLogProbs(
                ids.int().cpu().numpy(), values.cpu().numpy(), (lse - shift).cpu().numpy(), tuple(temperatures)
            )
        )
    return TopKLogProbs.concatenate(parts)
