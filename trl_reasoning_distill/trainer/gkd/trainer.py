"""`TopKGKDTrainer`: distillation from a live teacher, on the dataset's completions and on the student's own.

`L = kd_weight · T² · D(teacher, student) + sft_weight · L_SFT (+ kl_coef · L_ref)`, each a sum over supervised tokens, divided once by the
number of them in the global batch *as it is trained on*: completions are written before the tokens are counted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor

from trl_reasoning_distill.hub import context_length, load_config
from trl_reasoning_distill.losses.fused import FusedLoss, LinearReference
from trl_reasoning_distill.losses.head import Head
from trl_reasoning_distill.teacher.context import TeacherContext
from trl_reasoning_distill.trainer.callbacks import show_samples
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.live_teacher import (
    FormerSelf,
    LiveTeacher,
    ModelTeacher,
    ServerTeacher,
    Support,
    Targets,
    TeacherBatch,
    count_shared_ids,
    load_teacher,
    load_teacher_tokenizer,
)
from trl_reasoning_distill.trainer.gkd.rollout_store import RolloutStore, make_rollout_store
from trl_reasoning_distill.trainer.gkd.rollouts import (
    Tally,
    make_writer,
    sample,
    timed,
    transformers_writer,
    written_row,
)
from trl_reasoning_distill.trainer.gkd.rows import (
    BATCH_PROMPTS,
    ROW_COLUMNS,
    TEACHER_COLUMNS,
    TEACHER_TOKENS,
    PromptAndCompletion,
    PromptCollator,
    PromptColumns,
    unpad,
)
from trl_reasoning_distill.trainer.head import LossBatch, distillation_means, distillation_sums
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.reference import make_reference
from trl_reasoning_distill.trainer.trl_bridge import (
    BridgedGKDTrainer,
    disable_dropout_in_model,
    main_process_first,
    unwrap_model_for_generation,
)

logger = logging.getLogger(__name__)

_STUDENT_WROTE = "student_wrote"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A micro-batch while its loss is computed: what the teacher has read, and which tokens the student wrote, if it did."""

    reading: Any
    inputs: dict[str, Tensor]
    student_wrote: bool


class TopKGKDTrainer(ReasoningSFTTrainer, BridgedGKDTrainer):
    """Generalised knowledge distillation (GKD) from a live teacher. Takes the arguments of TRL's `GKDTrainer` and `SFTTrainer`.

    Rows have `prompt` and `completion`, or `messages` that end with a reply; with `lmbda=1` the completions may be missing. Evaluation
    is on the dataset's completions.

    Logged beside `ReasoningSFTTrainer`'s metrics: `kd_loss` (T² included, `kd_weight` not), `teacher_mass` and `student_mass` on the
    support, `top1_agreement`; `on_policy_share` of the micro-batches, and of what was written `completion_length`, `truncated_share`,
    `dropped_share`, `generated_tokens_per_second`.

    To change one thing, override `loss_arguments(batch)` (weights, temperature, divergence) or `student_writes(number)` (who writes).

    Args:
        model: The student.
        teacher_model: A loaded model, a name or folder, or any `LiveTeacher`; `None` for what the configuration names, and where it
            names none, the student as it was before training.
        args: The configuration.
        teacher_tokenizer: The teacher's tokenizer, where it does not lie with the model.
        kwargs: For `SFTTrainer`.

    Attributes:
        teacher: Who is asked.
        shared_ids: Ids below this mean the same to teacher and student; what lies beyond carries no mass in the divergence.
        context: What the teacher reads beside the prompt.
        left_out: Per dataset, rows that the teacher cannot read: `not_anchored`, `too_long`.

    Raises:
        ValueError: If an argument cannot be honoured, or teacher and student have different tokenizers.

    Example:
        >>> args = TopKGKDConfig("runs/gkd", lmbda=0.5, beta=0.0, kd_top_k=50)
        >>> TopKGKDTrainer("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", args, train_dataset=rows).train()
    """

    _tag_names = ["trl", "gkd", "distillation", "top-k"]  # noqa: RUF012  # TRL's way
    _name = "Top-K GKD"
    config_class = TopKGKDConfig
    args: TopKGKDConfig
    whole_columns = ROW_COLUMNS
    resume_fields = (
        *ReasoningSFTTrainer.resume_fields,
        *(
            "teacher_model_name_or_path",
            "lmbda",
            "beta",
            "temperature",
            "max_new_tokens",
            "kd_top_k",
            "kd_temperature",
            "kd_weight",
            "sft_weight",
        ),
    )

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TopKGKDConfig | None = None,
        *,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        args = TopKGKDConfig(output_dir="trainer_output") if args is None else args
        if not isinstance(args, TopKGKDConfig):
            raise ValueError(f"{type(self).__name__} needs a TopKGKDConfig as `args`, found {type(args).__name__}.")
        if isinstance(teacher_model, str):
            args.teacher_model_name_or_path, teacher_model = teacher_model, None
        self._given_teacher, self._teacher_tokenizer = teacher_model, teacher_tokenizer
        self._reader: Any = None
        self._step: _Step | None = None
        self._targets: Targets | None = None
        self._tally = Tally()
        self._samples: collections.deque[dict[str, Any]] = collections.deque(maxlen=args.num_completions_to_print)
        self.shared_ids, self._teacher_limit = 0, 0
        self.context = TeacherContext(args) if args.teacher_context == "none" else None
        self.left_out: dict[str, dict[str, int]] = {}
        super().__init__(model, args, **kwargs)
        if self.has_images:
            raise ValueError("The dataset holds images; a live teacher reads text only. Use `sft` for it.")
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.teacher = self.make_teacher()
        self.writer = make_writer(self, self.generate_on_policy_outputs)
        self.teacher_writer = self.writer
        if args.seq_kd and args.use_vllm:  # vLLM holds the student
            self.teacher_writer = transformers_writer(self, self.generate_on_policy_outputs)
        self.rollout_store: RolloutStore | None = None
        if args.refresh_store is not None:
            self.rollout_store = make_rollout_store(self, str(args.refresh_store))
            self.add_callback(self.rollout_store)

    # The teacher

    @property
    def _is_former_self(self) -> bool:
        return self._given_teacher is None and self.args.teacher_model_name_or_path is None

    def _meet_teacher(self) -> None:
        """Learn which ids are shared and how long a row the teacher can read, before a row is tokenized or a weight loaded."""
        if self._is_former_self:
            self.shared_ids = 1 + max(self.tokenizer.get_vocab().values())
            return
        args, given = self.args, self._given_teacher
        if self._teacher_tokenizer is None:
            self._teacher_tokenizer = load_teacher_tokenizer(args, given)
        self.shared_ids = count_shared_ids(self._teacher_tokenizer, self.tokenizer)
        limit: int | None
        if args.teacher_server_url is not None:
            from trl_reasoning_distill.teacher.scoring import ServerReader

            name, top_k = str(args.teacher_model_name_or_path), int(args.kd_top_k or 1)
            self._reader = ServerReader(args.teacher_server_url, name, self._teacher_tokenizer, top_k)
            limit = self._reader.context_length
        elif given is None:
            name = str(args.teacher_model_name_or_path)
            limit = context_length(load_config(name, trust_remote_code=args.trust_remote_code))
        else:
            limit = given.context_length if hasattr(given, "targets") else context_length(given.config)
        self._teacher_limit = limit or 0

    def make_teacher(self) -> LiveTeacher:
        """The teacher as the arguments name it. Override it to bring one of your own."""
        args, given = self.args, self._given_teacher
        if hasattr(given, "targets"):
            return given
        rows = [self._student.config.get_text_config().vocab_size]
        if self._reader is not None:
            return ServerTeacher(self._reader, self._support(rows))
        if self._is_former_self:
            if args.seq_kd and not is_peft_model(self.model):
                raise ValueError(
                    "`seq_kd` with a frozen copy of the student as teacher: the copy is kept for its hidden states only. Name the model "
                    "itself with teacher_model_name_or_path, or train a LoRA adapter."
                )
            reference = self.reference or make_reference(self.model, self.accelerator)
            writer = self._former_self_writing if is_peft_model(self.model) else None
            return FormerSelf(reference, self._student, self._support(rows), writer)
        teacher = load_teacher(str(args.teacher_model_name_or_path), args, self.accelerator) if given is None else given
        rows.append(teacher.config.get_text_config().vocab_size)
        return ModelTeacher(teacher, self.accelerator, self._support(rows))

    def _support(self, embedding_rows: list[int]) -> Support:
        shared = min(self.shared_ids, *embedding_rows)
        on = "student" if self.args.beta == 1.0 else "teacher"
        return Support(shared, self.args.kd_top_k, on)

    @property
    def _student(self) -> Any:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    # Data

    def prepare_dataset(
        self, dataset: Dataset | IterableDataset, *, packing: bool, formatting_func: Any, name: str
    ) -> Dataset:
        """See `ReasoningSFTTrainer.prepare_dataset`; rows come as prompt and completion, or as messages."""
        if formatting_func is not None:
            raise ValueError(
                "`formatting_func` makes plain text, which has no prompt to write from: give rows with `prompt`."
            )
        if not self.shared_ids:
            self._meet_teacher()
        if isinstance(dataset, Dataset):
            self.completion_only_loss = True
            dataset = self.normalize(dataset, name)
            with main_process_first():
                dataset = dataset.map(PromptAndCompletion(self._needs_reply(name)), num_proc=self.args.dataset_num_proc)
            if self.context is None:  # the training set comes first: examples are drawn from it alone
                self.context = TeacherContext(self.args, dataset)
        return super().prepare_dataset(dataset, packing=packing, formatting_func=None, name=name)

    def _needs_reply(self, name: str) -> bool:
        """Whether a row of this dataset must bring its completion; in training a model may write all of them."""
        return name != "train" or self.args.needs_reply

    def normalize(self, dataset: Dataset, name: str, *, needs_reply: bool = True) -> Dataset:
        """See `ReasoningSFTTrainer.normalize`; a completion that a model writes may be missing."""
        return super().normalize(dataset, name, needs_reply=needs_reply and self._needs_reply(name))

    def add_row_columns(self, rows: Dataset, name: str, **map_kwargs: Any) -> Dataset:
        """See `ReasoningSFTTrainer.add_row_columns`; adds the prompts, and leaves out what the teacher cannot read."""
        rows = super().add_row_columns(rows, name, **map_kwargs)
        assert self.context is not None
        columns = PromptColumns(self.tokenizer, self.context, template_options(self.args), self.shared_ids)
        rows = rows.map(columns, desc=f"Tokenizing the teacher's prompts of the {name} dataset", **map_kwargs)
        lengths = list(rows[TEACHER_TOKENS])
        limit = self._teacher_limit or max(lengths)
        keep = [index for index, length in enumerate(lengths) if 0 < length <= limit]
        self.left_out[name] = {
            "not_anchored": lengths.count(0),
            "too_long": sum(length > limit for length in lengths),
        }
        if len(keep) < len(rows):
            if not keep:
                raise ValueError(
                    f"The teacher can read none of the {len(rows):,} rows of the {name} dataset: {self.left_out[name]['not_anchored']:,} have "
                    f"other completion ids behind its prompt, {self.left_out[name]['too_long']:,} are longer than its {limit:,} tokens."
                )
            if self.args.process_index == 0:
                logger.warning("%s dataset: the teacher cannot read %s rows", name, self.left_out[name])
            rows = rows.select(keep)
        return rows

    def make_collator(self, base: Any) -> PromptCollator:
        """See `ReasoningSFTTrainer.make_collator`."""
        return PromptCollator(super().make_collator(base), self.tokenizer.pad_token_id)

    # Writing

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, completions written, and then the number of their supervised tokens on all ranks."""
        self._tally = Tally()
        samples = super().get_batch_samples(self._written(epoch_iterator), num_batches, device)
        self.model.train()  # what follows is training, and so are these metrics
        self.record(**self._tally.metrics(self.accelerator))
        return samples

    def _written(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            self._tally.batches += 1
            by_student = self.student_writes(number)
            if by_student or self.args.seq_kd:
                with timed(self._tally):
                    batch = self._write(batch, by_student)
            yield batch

    def student_writes(self, number: int) -> bool:
        """Whether the student writes the completions of this step's micro-batch of that number: with probability `lmbda`.

        All ranks, and a resumed run, come to the same decision.
        """
        return random.Random(f"{self.args.seed} {self.state.global_step} {number}").random() < self.args.lmbda

    def _write(self, batch: dict[str, Any], by_student: bool) -> dict[str, Any]:
        """The batch with completions that the student or the teacher writes now."""
        prompts, mask = batch["prompts"], batch["prompt_attention_mask"]
        own = unpad(prompts, mask)
        before = None
        if "teacher_prompts" in batch:
            before = unpad(batch["teacher_prompts"], batch["teacher_prompt_attention_mask"])
        rooms = [self._room(len(ids), len((before or own)[number])) for number, ids in enumerate(own)]
        step = self.state.global_step
        with torch.no_grad(), self.compute_loss_context_manager():
            if by_student:
                with self._student_writing() as model:
                    written = self.writer.write(model, prompts, mask, rooms, step)
            else:
                if before is not None:
                    prompts, mask = batch["teacher_prompts"], batch["teacher_prompt_attention_mask"]
                with self.teacher.writer() as model:
                    written = self.teacher_writer.write(model, prompts, mask, rooms, step)
        drops = self.args.truncated_rollouts == "drop"
        rows = [written_row(ids, one, by_student, drops) for ids, one in zip(own, written, strict=True)]
        self._tally.count(written, rows, by_student)
        if self.args.log_completions and self.accelerator.is_main_process:
            self._samples.extend(
                sample(self.tokenizer, *pair, step, by_student) for pair in zip(own, written, strict=True)
            )
        collator: Any = self.data_collator
        laid_out = collator.lay_out(rows, before)
        moved = {name: value.to(self.args.device) for name, value in laid_out.items()}
        return moved | {_STUDENT_WROTE: by_student}

    def _room(self, prompt: int, teacher_prompt: int) -> int:
        """Tokens that a completion may have."""
        limits = [(self.args.max_length, prompt), (context_length(self._student.config), prompt)]
        limits.append((self._teacher_limit or None, teacher_prompt))
        return min([self.args.max_new_tokens, *(limit - used for limit, used in limits if limit is not None)])

    @contextlib.contextmanager
    def _student_writing(self) -> Iterator[Any]:
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]  # parsed
        ) as model:
            yield model

    @contextlib.contextmanager
    def _former_self_writing(self) -> Iterator[Any]:
        with self._student_writing() as model, self.model.disable_adapter():
            yield model

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `ReasoningSFTTrainer.compute_loss`; the teacher reads first."""
        student_wrote = bool(inputs.get(_STUDENT_WROTE))
        inputs = {name: value for name, value in inputs.items() if name not in (*BATCH_PROMPTS, _STUDENT_WROTE)}
        columns = {name: inputs.pop(name) for name in TEACHER_COLUMNS if name in inputs}
        labels = inputs["labels"]
        batch = TeacherBatch(
            columns.get("teacher_input_ids", inputs["input_ids"]),
            columns.get("teacher_attention_mask", inputs["attention_mask"]),
            columns.get("teacher_shift", labels.new_zeros(len(labels))),
            labels,
        )
        self._step = _Step(self.teacher.read(batch), inputs, student_wrote)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._step = None

    def head_loss(self, hidden: Tensor, head: Head, batch: LossBatch, reference: LinearReference | None) -> FusedLoss:
        """See `ReasoningSFTTrainer.head_loss`; with the teacher's targets at hand."""
        step = self._step
        assert step is not None
        with self.teacher.targets(step.reading, hidden.device) as self._targets:
            if self.rollout_store is not None and step.student_wrote:
                row = step.inputs
                self.rollout_store.add(row["input_ids"], row["attention_mask"], row["labels"], self._targets)
            try:
                return super().head_loss(hidden, head, batch, reference)
            finally:
                self._targets = None

    def loss_arguments(self, batch: LossBatch) -> dict[str, Any]:
        """See `ReasoningSFTTrainer.loss_arguments`; adds the teacher's targets, the weights and the divergence."""
        arguments = super().loss_arguments(batch)
        return {
            **arguments,
            "sft_weight": self.args.sft_weight * arguments["sft_weight"],
            "teacher": self._targets,
            "kd_weight": self.args.kd_weight * batch.scale.expand(batch.labels.shape),
            "temperature": self.args.kd_temperature,
            **self.args.divergence,
        }

    # Metrics

    def metric_sums(self, outputs: FusedLoss) -> dict[str, Tensor]:
        """See `ReasoningSFTTrainer.metric_sums`."""
        return {**super().metric_sums(outputs), **distillation_sums(outputs)}

    def record_sums(self, sums: dict[str, float]) -> None:  # type: ignore[override]
        """See `ReasoningSFTTrainer.record_sums`."""
        super().record_sums(sums)
        self.record(**distillation_means(sums))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and show what was written."""
        super().log(logs, start_time)
        show_samples(list(self._samples), self)
        self._samples.clear()


def template_options(args: TopKGKDConfig) -> dict[str, Any]:
    """The chat template's variables for all rows."""
    options = args.chat_template_kwargs
    return dict(options) if isinstance(options, dict) else {}
