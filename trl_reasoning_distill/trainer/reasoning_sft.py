"""`ReasoningSFTTrainer`: TRL's SFTTrainer for chains of thought, and the base class of the distillation trainers.

What it adds: rows that are too long are dropped, not cut; a chat template that deletes or doubles the reasoning is refused before
the first step; tokens of the reasoning and of the answer can be weighted; a KL term keeps the model near what it was; and the loss is
one pass over the LM head, to which a subclass can add terms (see `loss_arguments`). Everything else is TRL's.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import SFTTrainer

from trl_reasoning_distill.data.examples import describe_examples
from trl_reasoning_distill.data.files import hash_path
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.published import Reading
from trl_reasoning_distill.data.row_sets import normalize
from trl_reasoning_distill.data.tokenization import is_supervised
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import (
    FusedLoss,
    LinearReference,
    LinearTeacher,
    fused_linear_distillation_loss,
)
from trl_reasoning_distill.losses.head import Head
from trl_reasoning_distill.teacher.store import TopKStore
from trl_reasoning_distill.trainer.callbacks import EarlyStopping, KLController, ShowText, TokenCount
from trl_reasoning_distill.trainer.card import extend_card, quick_start, training_facts
from trl_reasoning_distill.trainer.checkpoints import CheckpointManifests, ResumableTrainer
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, convert_config
from trl_reasoning_distill.trainer.head import LossBatch, add_head_loss
from trl_reasoning_distill.trainer.preparation import (
    LOSS_WEIGHT,
    TOKEN_COLUMNS,
    PreparationReport,
    RowTokenizer,
    pack_rows,
    select_rows,
)
from trl_reasoning_distill.trainer.reference import Reference, make_reference, refuse_learned_prompts
from trl_reasoning_distill.trainer.student import prepare_student, refuse_untrainable_adapter
from trl_reasoning_distill.trainer.targets import StoredTargets, TokenColumnsCollator
from trl_reasoning_distill.trainer.trl_bridge import (
    BridgedSFTTrainer,
    main_process_first,
    prove_whole_head,
    takes_arguments_of,
)

logger = logging.getLogger(__name__)

REFERENCE_INDEX = "reference_index"
REFERENCE_IDS = "reference_ids"
REFERENCE_LOG_PROBS = "reference_log_probs"
REFERENCE_LOG_TAIL = "reference_log_tail"

LiveTargets = Callable[[torch.device], contextlib.AbstractContextManager[LinearTeacher | TopKTargets | None]]
"""Gives a live teacher's distributions for a micro-batch, on a device, for as long as the loss is computed."""


class ReasoningSFTTrainer(ResumableTrainer, BridgedSFTTrainer):
    """Supervised fine-tuning on chains of thought. Takes all arguments of TRL's `SFTTrainer`, by position too.

    `args` may be any configuration whose fields `config_class` has, such as `SFTConfig` and `TrainingArguments`.

    Logged beside TRL's metrics: `sft_loss`, the mean negative log-likelihood of a supervised token without any weight, and
    `kl_loss`, the mean KL divergence to the reference, where there is one; with `kl_target` also `kl_coef`. `eval_loss` uses the
    configured `kl_coef`, so that it can be compared across steps.

    Attributes:
        reports: What became of each dataset, by its name: `"train"`, `"eval"`.
        reference: The model that the KL term holds on to; `None` without the term, or where its reference is a store.
        targets: Stores whose distributions the loss reads.
        kl_controller: Holds the KL near `kl_target`; `None` without one.
        preview: Some training examples as text, supervised tokens marked; printed when training starts.

    Raises:
        ValueError: If an argument cannot be honoured, if no row can be trained on, or if the chat template damages the reasoning.

    Example:
        >>> trainer = ReasoningSFTTrainer("Qwen/Qwen2.5-0.5B", ReasoningSFTConfig("runs/sft", use_kl_regularization=True), train_dataset=rows)
        >>> trainer.train()
    """

    _tag_names = ["trl", "sft", "reasoning"]  # noqa: RUF012  # TRL's way
    _name = "Reasoning SFT"
    config_class: type[ReasoningSFTConfig] = ReasoningSFTConfig
    resume_fields = (
        *ResumableTrainer.resume_fields,
        *("think_weight", "answer_weight", "use_kl_regularization", "kl_coef", "kl_direction", "kl_target"),
    )
    args: ReasoningSFTConfig

    @takes_arguments_of(SFTTrainer)
    def __init__(self, model: Any, args: ReasoningSFTConfig | None = None, **kwargs: Any) -> None:
        args = convert_config(args, self.config_class)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` is deprecated in TRL and will be removed in v2.0.0: the loss needs the full logits, which the fused head "
                f"never builds. Subclass `{type(self).__name__}` and override `compute_loss` instead, or `loss_arguments`."
            )
        adapter = kwargs.get("peft_config") or getattr(model, "active_peft_config", None)
        refuse_untrainable_adapter(adapter)
        if args.use_kl_regularization and args.reference_logits is None:
            refuse_learned_prompts(adapter)
        self.reports: dict[str, PreparationReport] = {}
        self.reference: Reference | None = None
        self.format = ReasoningFormat.preset(args.reasoning_format)
        self.targets = self.open_targets(args)
        read = [column for targets in self.targets for column in targets.columns]
        self.loss_columns = (*self.row_columns(args), *read)
        self.preview = ""
        student = prepare_student(
            model,
            args,
            tags=(self.format.open_tag, self.format.close_tag)
            if args.add_think_tokens and self.format.open_tag
            else (),
            processing_class=kwargs.pop("processing_class", None),
            peft_config=kwargs.pop("peft_config", None),
            train_dataset=kwargs.get("train_dataset"),
        )
        super().__init__(**{**vars(student), "args": args, **kwargs})
        self._refuse_what_columns_cannot_follow()
        self._refuse_offloaded_weights()
        self.token_count = TokenCount()
        self.add_callback(self.token_count)
        if self.preview:
            self.add_callback(ShowText(self.preview))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))
        self.data_collator = self.make_collator(self.data_collator)
        if args.use_kl_regularization and args.reference_logits is None:
            self.reference = make_reference(self.model, self.accelerator)
        self.add_callback(CheckpointManifests(self))
        self.kl_controller: KLController | None = None
        if args.use_kl_regularization and args.kl_target is not None:
            self.kl_controller = KLController(args.kl_coef, args.kl_target)
            self.add_callback(self.kl_controller)
        student = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_head_loss(student)
        prove_whole_head(student, self.accelerator)

    def _refuse_what_columns_cannot_follow(self) -> None:
        columns = self.row_columns(self.args)
        if self.skips_preparation and not self.has_images and columns:
            rows: Any = self.train_dataset
            missing = sorted(columns.keys() - next(iter(rows)).keys())
            if missing:
                raise ValueError(
                    f"`dataset_kwargs` with skip_prepare_dataset: the rows lack {', '.join(missing)}, which preparation adds for the loss. Add "
                    "them, or leave skip_prepare_dataset out."
                )
        if self.has_images and self.loss_columns:
            raise ValueError(
                f"The dataset holds images, so its rows are tokenized in the collator, where {', '.join(self.loss_columns)} cannot follow the "
                "tokens. Use text only, or leave out what needs these columns (think_weight, answer_weight, distillation)."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut a row over several ranks; the per-token columns of this trainer's loss are not cut with "
                "it. Set cp_size and sp_size to 1, and use packing, gradient checkpointing, ZeRO-3 or FSDP2 for long rows."
            )

    def _refuse_offloaded_weights(self) -> None:
        places = {str(place) for place in (getattr(self.model, "hf_device_map", None) or {}).values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"`device_map` puts parts of the model on {sorted(places)}: weights that wait on the CPU or on disk can be used, but not trained. Launch "
                "with accelerate_configs/zero3_offload.yaml, which offloads weights and optimizer, or train an adapter on 4 bits."
            )

    # Data

    def open_targets(self, args: ReasoningSFTConfig) -> list[StoredTargets]:
        """The stores whose distributions the loss needs: here the reference's, if it is a store."""
        if args.reference_logits is None:
            return []
        store = TopKStore.open(args.reference_logits)
        columns = (REFERENCE_INDEX, REFERENCE_IDS, REFERENCE_LOG_PROBS)
        log_tail = REFERENCE_LOG_TAIL if args.kl_direction == "reverse" else ""
        return [StoredTargets(store, store.top_k, 1.0, *columns, owner="the base student", log_tail=log_tail)]

    def row_columns(self, args: ReasoningSFTConfig) -> dict[str, float]:
        """Per-token columns of a prepared row beside TRL's, and what each holds where there is no supervised token."""
        columns: dict[str, float] = {targets.index: -1 for targets in self.targets}
        return columns | ({LOSS_WEIGHT: 0.0} if args.has_segment_weights else {})

    def make_collator(self, base: Any) -> Any:
        """The collator for these rows, around TRL's."""
        columns = self.row_columns(self.args)
        # Not of the embedding: adapters put wrappers of many kinds around that
        vocab_size = self.model.config.get_text_config().vocab_size
        return TokenColumnsCollator(base, columns, self.targets, vocab_size) if columns else base

    def add_row_columns(self, rows: Dataset, name: str, **map_kwargs: Any) -> Dataset:
        """Add the columns of `row_columns` that tokenizing alone does not give. Rows are whole here: nothing was cut or packed.

        Args:
            rows: With `input_ids`, `labels` and `row_hash`, and the dataset's own columns.
            name: The dataset's name, `"train"` or `"eval"` or what the user calls it.
            map_kwargs: For `Dataset.map`.
        """
        for targets in self.targets:
            rows = targets.number_rows(rows, name, self.tokenizer, **map_kwargs)
        return rows

    def prepare_dataset(
        self, dataset: Dataset | IterableDataset, *, packing: bool, formatting_func: Any, name: str
    ) -> Dataset:
        """See `BridgedSFTTrainer.prepare_dataset`; leaves what became of the rows in `reports[name]`."""
        args = self.args
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The {name} dataset is an IterableDataset. {type(self).__name__} counts, checks and matches all rows before the first step; "
                "load it with streaming=False."
            )
        own_columns = dataset.column_names
        if formatting_func is None:
            dataset = self.normalize(dataset, name)
        tokenize = RowTokenizer(
            self.tokenizer,
            self.format,
            completion_only=args.completion_only_loss is not False,
            assistant_only=args.assistant_only_loss,
            chat_template=self.chat_template,
            formatting_func=formatting_func,
            segment_weights=(args.think_weight, args.answer_weight) if args.has_segment_weights else None,
            chat_template_kwargs=args.template_variables,
        )
        map_kwargs = {"num_proc": args.dataset_num_proc}
        # The strategies that cut rows themselves are asked for by name; they are not for whole chains of thought
        cuts_rows = packing and args.packing_strategy != "bfd"
        columns = [*TOKEN_COLUMNS, *self.row_columns(args)]
        # TRL packs tokens and labels alone
        keeps_own = not args.remove_unused_columns and not packing
        own_columns = [column for column in own_columns if keeps_own and column not in columns]
        tokenize.refuse_closed_thought(dataset, name)
        with main_process_first():
            rows = dataset.map(tokenize, desc=f"Tokenizing the {name} dataset", **map_kwargs)
            tokenize.refuse_damage(rows, name)
            rows = self.add_row_columns(rows, name, **map_kwargs)
            rows, self.reports[name] = select_rows(
                rows,
                max_length=None if cuts_rows else args.max_length,
                overlong=args.overlong,
                columns=columns,
                whole_columns=[*self.whole_columns, *own_columns],
                malformed=args.malformed_thoughts,
                truncation_mode=args.truncation_mode,
                packing=packing,
                **map_kwargs,
            )
            if name == "train" and args.preview_examples:
                first = rows.select(range(min(args.preview_examples, len(rows))))
                self.preview = describe_examples(first, self.tokenizer, self.format)
            if args.shuffle_dataset:
                rows = rows.shuffle(seed=args.seed)
            if packing:
                if args.max_length is None:
                    raise ValueError("`packing` needs `max_length`: it is the length of a packed sequence.")
                rows = pack_rows(
                    rows, args.max_length, args.packing_strategy, desc=f"Packing the {name} dataset", **map_kwargs
                )
                rows = rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
        if args.process_index == 0:
            logger.info("%s dataset: %s", name, self.reports[name])
        return rows

    def normalize(self, dataset: Dataset, name: str, *, needs_reply: bool = True) -> Dataset:
        """Rows of any published shape as prompt and completion; those that are, as they are."""
        args = self.args
        reading = Reading(
            self.format,
            every_reply=args.assistant_only_loss,
            needs_reply=needs_reply,
            text_field=args.dataset_text_field,
        )
        dataset, line = normalize(dataset, reading, f"the {name} dataset")
        if args.process_index == 0:
            logger.info(line)
        return dataset

    def resume_settings(self) -> dict[str, Any]:
        """See `ResumableTrainer.resume_settings`; adds the stores by their content."""
        stores = {
            f"store of {targets.owner}": hash_path(targets.store.path / "manifest.json") for targets in self.targets
        }
        return {**super().resume_settings(), **stores}

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, scaled as TRL 1.16 scales it, and its metrics."""
        return self.fused_loss(model, inputs, return_outputs, num_items_in_batch)

    def fused_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
        live_targets: LiveTargets = lambda device: contextlib.nullcontext(),
    ) -> Any:
        """`compute_loss`, with the distributions of a live teacher where there is one."""
        columns = {name: inputs[name] for name in self.loss_columns if name in inputs}
        labels = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name not in columns and name != "labels"}

        def head_loss(
            hidden: Tensor, head: Head, reference_hidden: Tensor | None, reference_head: Head | None
        ) -> FusedLoss:
            reference = None
            if reference_hidden is not None and reference_head is not None:
                reference = LinearReference(_predicting(reference_hidden, labels), *reference_head)
            with live_targets(hidden.device) as teacher:
                batch = self._flatten(labels, columns, num_items_in_batch, hidden.device, teacher)
                return self.head_loss(_predicting(hidden, labels), head, batch, reference)

        outputs = model(**model_inputs, head_loss=head_loss, reference=self.reference)
        loss = outputs.objective
        if self.aux_loss_enabled:
            # A mean per micro-batch, which DDP averages over ranks: only accumulation is left to divide by
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._record_metrics(outputs.per_token, outputs.aux_loss, inputs)
        if return_outputs:
            warnings.warn(
                "`compute_metrics` and `preprocess_logits_for_metrics` need the logits, which the fused head does not build: they are "
                "computed with one more forward.",
                stacklevel=2,
            )
            with torch.no_grad():
                return loss, model(**model_inputs)
        return loss

    def head_loss(self, hidden: Tensor, head: Head, batch: LossBatch, reference: LinearReference | None) -> FusedLoss:
        """The loss from hidden states `(tokens, h)`. Runs inside the forward of the wrapped model, with the head's weight gathered."""
        arguments = self.loss_arguments(batch)
        if self.args.loss_type == "dft":
            # Each token weighs as much as the model believes it (arXiv:2508.05629): one pass more, to learn how much that is
            with torch.no_grad():
                nll = fused_linear_distillation_loss(hidden, head.weight, batch.labels, **_transform(head)).nll
            arguments["sft_weight"] = arguments["sft_weight"] * torch.exp(-nll)
        arguments.setdefault("reference", reference)
        return fused_linear_distillation_loss(hidden, head.weight, batch.labels, **_transform(head), **arguments)

    def loss_arguments(self, batch: LossBatch) -> dict[str, Any]:
        """What the loss of this batch is made of: keyword arguments of `fused_linear_distillation_loss`.

        Override it to change a weight, a temperature or the targets, calling `super()` for the rest. Weights are per token and hold
        `batch.scale` already.
        """
        weight = batch.scale.expand(batch.labels.shape)
        if LOSS_WEIGHT in batch.columns:
            weight = weight * batch.columns[LOSS_WEIGHT]
        arguments: dict[str, Any] = {"sft_weight": weight}
        if self.args.use_kl_regularization:
            coefficient = self.args.kl_coef
            if self.kl_controller is not None and batch.is_training:
                coefficient = self.kl_controller.coefficient
            arguments["kl_weight"] = coefficient * batch.scale.expand(batch.labels.shape)
            arguments["kl_direction"] = self.args.kl_direction
        if REFERENCE_IDS in batch.columns:
            columns = batch.columns
            arguments["reference"] = TopKTargets(
                columns[REFERENCE_IDS], columns[REFERENCE_LOG_PROBS], columns.get(REFERENCE_LOG_TAIL)
            )
        return arguments

    def _flatten(
        self,
        labels: Tensor,
        columns: Mapping[str, Tensor],
        num_items_in_batch: Tensor | int | None,
        device: torch.device,
        teacher: LinearTeacher | TopKTargets | None,
    ) -> LossBatch:
        targets = labels[:, 1:].reshape(-1).to(device)
        if num_items_in_batch is None:
            scale = 1.0 / is_supervised(targets).sum().clamp(min=1)
        else:
            scale = 1.0 / torch.as_tensor(num_items_in_batch, device=device).clamp(min=1)
            # The count is of all ranks' tokens, and DDP averages over ranks
            if self.args.average_tokens_across_devices:
                scale = scale * (self.accelerator.num_processes // self.get_tp_size())
        flat = {name: column[:, 1:].flatten(0, 1).to(device) for name, column in columns.items()}
        return LossBatch(targets, flat, scale.float(), self.state.global_step, self.model.training, teacher)

    # Metrics

    def metric_sums(self, outputs: FusedLoss) -> dict[str, Tensor]:
        """Sums over this rank's supervised tokens that metrics are made of; each scalar."""
        sums = {
            "tokens": outputs.mask.sum(),
            "nll": outputs.nll.sum(),
            "entropy": outputs.entropy.sum(),
            "top1": outputs.is_top1.sum(),
        }
        if self.args.use_kl_regularization:
            sums["kl"] = outputs.kl.sum()
        return sums

    def record_sums(self, sums: Mapping[str, float]) -> None:
        """Log metrics from the sums of `metric_sums` over all ranks."""
        tokens = max(sums["tokens"], 1.0)
        self.record(
            entropy=sums["entropy"] / tokens, mean_token_accuracy=sums["top1"] / tokens, sft_loss=sums["nll"] / tokens
        )
        if sums.get("kl_tokens"):
            self.record(kl_loss=sums["kl"] / sums["kl_tokens"])
            if self.kl_controller is not None and self.model.training:
                self.record(kl_coef=self.kl_controller.coefficient)
                self.kl_controller.add(sums["kl"], sums["kl_tokens"])

    def _record_metrics(self, per_token: FusedLoss, aux_loss: Tensor | None, inputs: Mapping[str, Any]) -> None:
        sums = self.metric_sums(per_token)
        sums["length"] = (
            inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())
        )
        if "kl" in sums:
            sums["kl_tokens"] = sums["tokens"]
            if REFERENCE_IDS in inputs:  # rows for evaluation need not be in the store
                sums["kl_tokens"] = (inputs[REFERENCE_IDS][:, 1:] >= 0).any(-1).sum()
        if aux_loss is not None:
            sums["aux_loss"] = aux_loss.detach() / self.accelerator.num_processes
        # One collective for all of them; float64, so that counts stay whole
        local = torch.stack([value.to(self.args.device, torch.float64) for value in sums.values()])
        totals = dict(zip(sums, self.accelerator.reduce(local, "sum").tolist(), strict=True))
        self.record_sums(totals)
        if "aux_loss" in totals:
            self.record(aux_loss=totals["aux_loss"])
        if self.model.training:
            copies = self.copies_of_batch
            self.token_count.add(
                tokens=int(totals["length"]) // copies, supervised_tokens=int(totals["tokens"]) // copies
            )
        self.record_total(num_tokens=self.token_count.tokens)

    # Model card

    def card_sections(self) -> dict[str, Mapping[str, Any]]:
        """Facts for the model card, by heading. A subclass adds what is special to it."""
        return training_facts(self)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not transformers'
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card, with how to prompt the model, what it was trained on, with which settings, and how that went. It never stops a save."""
        try:
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                path = Path(str(self.args.output_dir), "README.md")
                extend_card(path, quick_start=quick_start(self, self.format), sections=self.card_sections())
        except Exception as error:  # it is written with each checkpoint, which must not be lost for a sentence
            logger.warning("The model card could not be written: %s: %s", type(error).__name__, error)

    @property
    def supervised_tokens_seen(self) -> int:
        """Supervised tokens trained on so far, on all ranks, resumed runs included."""
        return self.token_count.supervised_tokens


def _predicting(hidden: Tensor, labels: Tensor) -> Tensor:
    """The hidden states `(tokens, h)` that predict `labels[:, 1:]`; learned prompts in front of the row predict none of them."""
    return hidden[:, hidden.shape[1] - labels.shape[1] : -1].flatten(0, 1)


def _transform(head: Head) -> dict[str, Any]:
    return {"bias": head.bias, "logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}
