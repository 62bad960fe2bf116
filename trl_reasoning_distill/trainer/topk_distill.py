"""`TopKDistillTrainer`: offline Top-K logit distillation, `L = L_SFT + α(step) · L_KD (+ kl_coef · L_ref)`.

The teacher was scored once, by `capture`. Each supervised token carries the number of its record in the store (`kd_index`), through
truncation, shuffling, packing and resumption; the collator reads the records, and the divergence is computed in the same pass over
the LM head as the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from trl_reasoning_distill.losses.divergence import TopKTargets, topk_divergence
from trl_reasoning_distill.losses.fused import FusedLoss
from trl_reasoning_distill.losses.schedule import kd_weight_at
from trl_reasoning_distill.teacher.store import TopKStore
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig, convert_config
from trl_reasoning_distill.trainer.head import LossBatch, distillation_means, distillation_sums
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.targets import KD_IDS, KD_INDEX, KD_LOG_PROBS, KD_LOG_TAIL, StoredTargets
from trl_reasoning_distill.trainer.trl_bridge import takes_arguments_of

KD_EXAMPLE_WEIGHT = "kd_example_weight"


class TopKDistillTrainer(ReasoningSFTTrainer):
    """Distils a teacher's stored Top-K log-probabilities into a student. Takes all arguments of TRL's `SFTTrainer`.

    `train_dataset` is the text that the store was captured on (its rows are found in the store by their tokens), a part of
    `store.dataset()`, or `None` for all of the store. A row of an evaluation set that is not in the store has no distillation loss.

    Logged beside `ReasoningSFTTrainer`'s metrics: `kd_loss` (per token with a target, T² included, α not), `kd_weight` (α),
    `teacher_mass` and `student_mass` on the support at the temperature, `top1_agreement`; in evaluation with `eval_` before them.
    `eval_loss` uses the full α, so that it can be compared across steps.

    To change one thing, override one of:

    - `kd_weight_at(step)`: α.
    - `kd_loss(...)`: the divergence, from log-probabilities on the support.
    - `loss_arguments(batch)`: weights, temperature or targets of a micro-batch.

    Attributes:
        store: The teacher's records.

    Raises:
        StoreError: If the store was not made for these tokens; the message names what differs.
        ValueError: If an argument cannot be honoured.

    Example:
        >>> args = TopKDistillConfig("runs/distill", teacher_logits="runs/capture", kd_weight=0.35, kd_temperature=2.0)
        >>> TopKDistillTrainer("Qwen/Qwen2.5-0.5B-Instruct", args).train()
    """

    _tag_names = ["trl", "sft", "distillation", "top-k"]  # noqa: RUF012  # TRL's way
    _name = "Top-K distillation"
    _paper = {  # noqa: RUF012
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
        "citation": (
            "@article{hinton2015distilling,\n  title={Distilling the Knowledge in a Neural Network},\n"
            "  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},\n  journal={arXiv preprint arXiv:1503.02531},\n  year={2015}\n}"
        ),
    }
    config_class = TopKDistillConfig
    resume_fields = (
        *ReasoningSFTTrainer.resume_fields,
        *("kd_top_k", "kd_temperature", "kd_weight", "kd_warmup_ratio", "kd_warmup_steps", "kd_divergence", "kd_beta"),
        *("kd_support", "kd_top_p", "kd_scale_by_t2"),
    )
    args: TopKDistillConfig

    @takes_arguments_of(SFTTrainer)
    def __init__(
        self,
        model: Any,
        args: TopKDistillConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = convert_config(args, self.config_class)
        assert isinstance(args, TopKDistillConfig)
        self.store = TopKStore.open(str(args.teacher_logits))
        if args.kd_top_k > self.store.top_k:
            raise ValueError(
                f"`kd_top_k={args.kd_top_k}`: the store at {self.store.path} holds {self.store.top_k} ids per position. Use at most that, or "
                f"capture again with --store_top_k {args.kd_top_k}."
            )
        train_dataset = self.store.dataset() if train_dataset is None else train_dataset
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

    # Data

    def open_targets(self, args: ReasoningSFTConfig) -> list[StoredTargets]:
        """See `ReasoningSFTTrainer.open_targets`; the teacher's come first."""
        assert isinstance(args, TopKDistillConfig)
        columns = (KD_INDEX, KD_IDS, KD_LOG_PROBS)
        log_tail = "" if args.kd_divergence == "forward_kl" else KD_LOG_TAIL
        teacher = StoredTargets(
            self.store, args.kd_top_k, args.kd_temperature, *columns, owner="the teacher", log_tail=log_tail
        )
        return [teacher, *super().open_targets(args)]

    def row_columns(self, args: ReasoningSFTConfig) -> dict[str, float]:
        """See `ReasoningSFTTrainer.row_columns`."""
        columns = super().row_columns(args)
        if getattr(args, "kd_weight_column", None) is not None:
            columns[KD_EXAMPLE_WEIGHT] = 0.0
        return columns

    def add_row_columns(self, rows: Dataset, name: str, **map_kwargs: Any) -> Dataset:
        """See `ReasoningSFTTrainer.add_row_columns`; lays out the example's weight."""
        rows = super().add_row_columns(rows, name, **map_kwargs)
        column = self.args.kd_weight_column
        if column is not None:
            if column not in rows.column_names:
                raise ValueError(
                    f"`kd_weight_column={column!r}`: the {name} dataset has no such column, only {rows.column_names}."
                )
            rows = rows.map(_spread_weight, fn_kwargs={"column": column}, **map_kwargs)
        return rows

    def card_sections(self) -> dict[str, Mapping[str, Any]]:
        """See `ReasoningSFTTrainer.card_sections`; adds the teacher and how its log-probabilities were used."""
        args, captured = self.args, self.store.fingerprint
        teacher = {
            name: captured[name] for name in ("teacher", "revision", "dtype", "quantization") if captured.get(name)
        }
        distillation = {
            "divergence": f"{args.kd_divergence} on {args.kd_support}, top {args.kd_top_k} of {self.store.top_k} stored",
            "temperature": f"{args.kd_temperature:g}",
            "weight": f"{args.kd_weight:g} after {self.kd_warmup_steps:,} warm-up steps",
            "positions in the store": f"{len(self.store):,}",
        }
        return {**super().card_sections(), "Teacher": teacher | distillation}

    # Loss

    @property
    def kd_warmup_steps(self) -> int:
        """Optimizer steps over which α rises."""
        if self.args.kd_warmup_steps is not None:
            return self.args.kd_warmup_steps
        return round(self.args.kd_warmup_ratio * self.state.max_steps)

    def kd_weight_at(self, step: int) -> float:
        """α after `step` optimizer steps: linear from 0 over the warm-up, then `kd_weight`."""
        return kd_weight_at(step, self.args.kd_weight, self.kd_warmup_steps)

    def kd_loss(self, student_log_probs: Tensor, teacher_log_probs: Tensor, student_log_tail: Tensor) -> Tensor:
        """The divergence per token. Override it to plug in one's own; it is differentiated by autograd.

        Args:
            student_log_probs: `(tokens, entries)` at the temperature: of the label and of the teacher's ids, each id once.
            teacher_log_probs: `(tokens, entries)`, the same of the teacher; −inf for an entry outside its Top-K.
            student_log_tail: `(tokens,)`, log of the student's mass outside the entries.

        Returns:
            `(tokens,)`, not multiplied by T².
        """
        return topk_divergence(
            student_log_probs, teacher_log_probs, student_log_tail=student_log_tail, **self._divergence_arguments()
        )

    def loss_arguments(self, batch: LossBatch) -> dict[str, Any]:
        """See `ReasoningSFTTrainer.loss_arguments`; adds the teacher's targets, α and the divergence."""
        alpha = self.kd_weight_at(batch.step) if batch.is_training else self.args.kd_weight
        weight = alpha * batch.scale.expand(batch.labels.shape)
        if KD_EXAMPLE_WEIGHT in batch.columns:
            weight = weight * batch.columns[KD_EXAMPLE_WEIGHT]
        divergence: dict[str, Any] = self._divergence_arguments()
        if type(self).kd_loss is not TopKDistillTrainer.kd_loss:
            divergence["divergence"] = self.kd_loss
        return {
            **super().loss_arguments(batch),
            "teacher": TopKTargets(batch.columns[KD_IDS], batch.columns[KD_LOG_PROBS], batch.columns.get(KD_LOG_TAIL)),
            "kd_weight": weight,
            "temperature": self.args.kd_temperature,
            "top_p": self.args.kd_top_p,
            "scale_by_t2": self.args.kd_scale_by_t2,
            **divergence,
        }

    def _divergence_arguments(self) -> dict[str, Any]:
        return {"divergence": self.args.kd_divergence, "beta": self.args.kd_beta, "support": self.args.kd_support}

    # Metrics

    def metric_sums(self, outputs: FusedLoss) -> dict[str, Tensor]:
        """See `ReasoningSFTTrainer.metric_sums`."""
        return {**super().metric_sums(outputs), **distillation_sums(outputs)}

    def record_sums(self, sums: dict[str, float]) -> None:  # type: ignore[override]
        """See `ReasoningSFTTrainer.record_sums`."""
        super().record_sums(sums)
        self.record(**distillation_means(sums))
        if self.model.training:
            self.record(kd_weight=self.kd_weight_at(self.state.global_step))


def _spread_weight(row: dict[str, Any], column: str) -> dict[str, list[float]]:
    return {KD_EXAMPLE_WEIGHT: [float(row[column])] * len(row["input_ids"])}
