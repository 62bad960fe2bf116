"""`TopKGKDTrainer`: distillation from a live teacher, on the dataset's completions and on the student's own.

`L = kd_weight · T² · D(teacher, student) + sft_weight · L_SFT (+ kl_coef · L_ref)`, each a sum over supervised tokens, divided once by the
number of them in the global batch *as it is trained on*: completions are written before the tokens are counted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import random
from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import GenerationConfig
from trl import SFTTrainer

from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
from trl_reasoning_distill.hub import context_length, load_config
from trl_reasoning_distill.losses.fused import FusedLoss, LinearTeacher
from trl_reasoning_distill.teacher.context import TeacherContext
from trl_reasoning_distill.teacher.sampling.transformers import eos_token_ids
from trl_reasoning_distill.trainer.callbacks import show_samples
from trl_reasoning_distill.trainer.config import convert_config
from trl_reasoning_distill.trainer.gkd.base import ARGUMENTS, BridgedGKDTrainer, refuse_unused_overrides
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.live_teacher import (
    FormerSelf,
    LiveTeacher,
    ModelTeacher,
    ServerTeacher,
    Targets,
    TeacherBatch,
    count_shared_ids,
    load_teacher,
    load_teacher_tokenizer,
    vocabulary_rows,
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
    disable_dropout_in_model,
    main_process_first,
    takes_arguments_of,
    unwrap_model_for_generation,
)

logger = logging.getLogger(__name__)

_STUDENT_WROTE = "student_wrote"
_GENERATION_KWARGS = ("max_new_tokens", "temperature", "do_sample", "top_k", "top_p", "use_cache", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """What must be known of a teacher before a row is tokenized or a weight is loaded.

    Attributes:
        shared_ids: Ids below this mean the same to teacher and student.
        context_length: Most tokens of a row that the teacher reads; `None` for any number.
        reader: Sends requests to a teacher that is a server; `None` for another.
    """

    shared_ids: int
    context_length: int | None
    reader: Any = None


class TopKGKDTrainer(ReasoningSFTTrainer, BridgedGKDTrainer):
    """Generalised knowledge distillation (GKD) from a live teacher. Takes the arguments of TRL's `GKDTrainer` and `SFTTrainer`.

    Rows have `prompt` and `completion`, or `messages` that end with a reply; with `lmbda=1` the completions may be missing. Evaluation
    is on the dataset's completions.

    Logged beside `ReasoningSFTTrainer`'s metrics: `kd_loss` (T² included, `kd_weight` not), `teacher_mass` and `student_mass` on the
    support, `top1_agreement`; `on_policy_share` of the micro-batches, and of what was written `completion_length`, `truncated_share`,
    `dropped_share`, `generated_tokens_per_second`.

    To change one thing, override `loss_arguments(batch)` (weights, temperature, divergence), `student_writes(number)` (who writes) or
    `generate_on_policy_outputs` (how). A subclass that overrides a method of `GKDTrainer` which is never called here is refused.

    Args:
        model: The student.
        teacher_model: A loaded model, a name or folder, or any `LiveTeacher`; `None` for what the configuration names, and where it
            names none, the student as it was before training.
        args: The configuration; a `GKDConfig` is converted.
        teacher_tokenizer: The teacher's tokenizer, where it is not saved with the model.
        kwargs: The other arguments of `GKDTrainer` and `SFTTrainer`; those of `GKDTrainer` may be given by position.

    Attributes:
        teacher: The live teacher.
        teacher_model: Its model, where it is one in this process; assign another model to replace the teacher.
        lmbda: As configured; read at each step, as are `beta` and `seq_kd`.
        generation_config: How completions are sampled; read at each step, and `temperature` is that of it.
        shared_ids: Ids below this mean the same to teacher and student; those beyond carry no mass in the divergence.
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
    _paper = {  # noqa: RUF012
        "title": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "id": "2306.13649",
        "citation": (
            "@inproceedings{agarwal2024on-policy,\n  title={On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},\n"
            "  author={Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos Garea, Sabela and Geist, Matthieu "
            "and Bachem, Olivier},\n  booktitle={ICLR},\n  year={2024},\n  url={https://openreview.net/forum?id=3zKtaqxLhW}\n}"
        ),
    }
    config_class = TopKGKDConfig
    args: TopKGKDConfig
    whole_columns = ROW_COLUMNS
    resume_fields = (
        *ReasoningSFTTrainer.resume_fields,
        *("teacher_model_name_or_path", "lmbda", "beta", "temperature", "max_new_tokens", "kd_top_k", "kd_temperature"),
        *("kd_weight", "sft_weight"),
    )

    @takes_arguments_of(SFTTrainer, ARGUMENTS)
    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: TopKGKDConfig | None = None,
        *,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        args = convert_config(args, TopKGKDConfig)
        if isinstance(teacher_model, str):
            args.teacher_model_name_or_path, teacher_model = teacher_model, None
        self._refuse_what_has_no_effect(args, teacher_model)
        self.lmbda, self.beta, self.seq_kd = args.lmbda, args.beta, args.seq_kd
        self._given_student, self._given_teacher, self._teacher_tokenizer = model, teacher_model, teacher_tokenizer
        self._tally = Tally()
        self._samples: collections.deque[dict[str, Any]] = collections.deque(maxlen=args.num_completions_to_print)
        self.context = TeacherContext(args) if args.teacher_context == "none" else None
        self.left_out: dict[str, dict[str, int]] = {}
        super().__init__(model, args, **kwargs)
        if self.has_images:
            raise ValueError("The dataset holds images; a live teacher reads text only. Use `sft` for it.")
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.generation_config = self._make_generation_config()
        self.teacher = self.make_teacher()
        self.writer = make_writer(self)
        # vLLM holds the student's weights
        self.teacher_writer = transformers_writer(self) if args.use_vllm else self.writer
        self.rollout_store: RolloutStore | None = None
        if args.refresh_store is not None:
            self.rollout_store = make_rollout_store(self, str(args.refresh_store))
            self.add_callback(self.rollout_store)

    @classmethod
    def _refuse_what_has_no_effect(cls, args: TopKGKDConfig, teacher: Any) -> None:
        refuse_unused_overrides(cls, TopKGKDTrainer)
        if args.use_vllm and cls.generate_on_policy_outputs is not TopKGKDTrainer.generate_on_policy_outputs:
            raise ValueError(
                f"{cls.__name__} overrides `generate_on_policy_outputs`, which is not called with `use_vllm`: leave that out."
            )
        for name in ("teacher_model_init_kwargs", "teacher_quantization"):
            if getattr(args, name) and (teacher is not None or not args.loads_teacher):
                found = "is already instantiated" if teacher is not None else "is not loaded here"
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}`, but the teacher {found}. Give the teacher by its name, or leave {name} out."
                )

    # What GKDTrainer has

    @property
    def teacher_model(self) -> Any:
        """The teacher's model as it is called; `None` where the teacher is a server or the student as it was."""
        return getattr(self.teacher, "wrapped", None)

    @teacher_model.setter
    def teacher_model(self, model: Any) -> None:
        self.teacher = ModelTeacher(model, self.accelerator, min(self.shared_ids, vocabulary_rows(model.config)))

    @property
    def temperature(self) -> float:
        """The sampling temperature of `generation_config`, 0 for greedy."""
        return float(self.generation_config.temperature or 1.0) if self.generation_config.do_sample else 0.0

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.generation_config.update(do_sample=value > 0, temperature=value if value > 0 else None)

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """What TRL's GKDTrainer makes its `generation_config` of, as it is now."""
        return {name: getattr(self.generation_config, name) for name in _GENERATION_KWARGS}

    @generation_kwargs.setter
    def generation_kwargs(self, values: dict[str, Any]) -> None:
        self.generation_config.update(**values)

    @staticmethod
    def generate_on_policy_outputs(
        model: Any, inputs: dict[str, Tensor], generation_config: GenerationConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Completions of the prompts of a batch, as TRL's GKDTrainer writes them.

        Args:
            model: What generates.
            inputs: `prompts` and `prompt_attention_mask (batch, prompt length)`, padded on the left.
            generation_config: How to generate; `eos_token_id` is a list.

        Returns:
            Ids, attention mask and labels, each `(batch, length)`: prompt and completion, up to and with the first end token.
        """
        prompts, mask = inputs["prompts"], inputs["prompt_attention_mask"]
        ids = model.generate(input_ids=prompts, attention_mask=mask, generation_config=generation_config)
        completion = ids[:, prompts.shape[1] :]
        ends = torch.isin(completion, torch.tensor(generation_config.eos_token_id, device=ids.device))
        written = (ends.cumsum(1) - ends.long()) == 0
        labels = torch.cat([torch.full_like(prompts, IGNORE_INDEX), completion.masked_fill(~written, IGNORE_INDEX)], 1)
        return ids, torch.cat([mask, written.to(mask.dtype)], 1), labels

    def _make_generation_config(self) -> GenerationConfig:
        sampling = {"do_sample": True, "temperature": self.args.temperature} if self.args.temperature > 0 else {}
        return GenerationConfig(
            max_new_tokens=self.args.max_new_tokens,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=eos_token_ids(self.model, self.tokenizer),
            **sampling,
        )

    # The teacher

    @functools.cached_property
    def teacher_facts(self) -> TeacherFacts:
        """What is known of the teacher without its weights.

        Raises:
            ValueError: If teacher and student have different tokenizers, or a server does not answer.
        """
        args, given = self.args, self._given_teacher
        if self._is_former_self:
            return TeacherFacts(1 + max(self.tokenizer.get_vocab().values()), None)
        tokenizer = self._teacher_tokenizer
        if tokenizer is None:
            tokenizer = load_teacher_tokenizer(args, given, self.tokenizer, self._student_rows)
        shared_ids = count_shared_ids(tokenizer, self.tokenizer)
        name = str(args.teacher_model_name_or_path)
        if args.teacher_server_url is not None:
            from trl_reasoning_distill.teacher.scoring import ServerReader

            reader = ServerReader(args.teacher_server_url, name, tokenizer, int(args.kd_top_k or 1))
            return TeacherFacts(shared_ids, reader.context_length, reader)
        if given is None:
            config = load_config(name, trust_remote_code=args.trust_remote_code)
            return TeacherFacts(shared_ids, context_length(config))
        limit = given.context_length if hasattr(given, "targets") else context_length(given.config)
        return TeacherFacts(shared_ids, limit)

    @property
    def _student_rows(self) -> int:
        """Rows of the student's embedding, also before it is loaded."""
        given, trust = self._given_student, self.args.trust_remote_code
        config = load_config(given, trust_remote_code=trust) if isinstance(given, str) else given.config
        return vocabulary_rows(config)

    @property
    def shared_ids(self) -> int:
        """Ids below this mean the same to teacher and student."""
        return self.teacher_facts.shared_ids

    @property
    def _is_former_self(self) -> bool:
        return self._given_teacher is None and self.args.teacher_model_name_or_path is None

    def make_teacher(self) -> LiveTeacher:
        """The teacher as the arguments name it. Override it to bring one of your own."""
        args, given = self.args, self._given_teacher
        if hasattr(given, "targets"):
            return given
        shared_ids = min(self.shared_ids, vocabulary_rows(self._student.config))
        if self.teacher_facts.reader is not None:
            return ServerTeacher(self.teacher_facts.reader, shared_ids)
        if self._is_former_self:
            if self.seq_kd and not is_peft_model(self.model):
                raise ValueError(
                    "`seq_kd` with a frozen copy of the student as teacher: the copy is kept for its hidden states only. Name the model "
                    "itself with teacher_model_name_or_path, or train a LoRA adapter."
                )
            reference = self.reference or make_reference(self.model, self.accelerator)
            writer = self._former_self_writing if is_peft_model(self.model) else None
            return FormerSelf(reference, self._student, shared_ids, writer)
        teacher = load_teacher(str(args.teacher_model_name_or_path), args, self.accelerator) if given is None else given
        return ModelTeacher(teacher, self.accelerator, min(shared_ids, vocabulary_rows(teacher.config)))

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
        _ = self.teacher_facts  # refused before a row is tokenized
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
        columns = PromptColumns(self.tokenizer, self.context, self.args.template_variables, self.shared_ids)
        rows = rows.map(columns, desc=f"Tokenizing the teacher's prompts of the {name} dataset", **map_kwargs)
        lengths = list(rows[TEACHER_TOKENS])
        limit = self.teacher_facts.context_length or max(lengths)
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
            if by_student or self.seq_kd:
                with timed(self._tally):
                    batch = self._write(batch, by_student)
            yield batch

    def student_writes(self, number: int) -> bool:
        """Whether the student writes the completions of this step's micro-batch of that number: with probability `lmbda`.

        All ranks, and a resumed run, come to the same decision.
        """
        return random.Random(f"{self.args.seed} {self.state.global_step} {number}").random() < self.lmbda

    def _write(self, batch: dict[str, Any], by_student: bool) -> dict[str, Any]:
        """The batch with completions that the student or the teacher writes now."""
        prompts, mask = batch["prompts"], batch["prompt_attention_mask"]
        own = unpad(prompts, mask)
        before = None
        if "teacher_prompts" in batch:
            before = unpad(batch["teacher_prompts"], batch["teacher_prompt_attention_mask"])
        limits = [self._completion_limit(len(ids), len((before or own)[number])) for number, ids in enumerate(own)]
        step = self.state.global_step
        with torch.no_grad(), self.compute_loss_context_manager():
            if by_student:
                with self._student_writing() as model:
                    written = self.writer.write(model, prompts, mask, limits, step)
            else:
                if before is not None:
                    prompts, mask = batch["teacher_prompts"], batch["teacher_prompt_attention_mask"]
                with self.teacher.writer() as model:
                    written = self.teacher_writer.write(model, prompts, mask, limits, step)
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

    def _completion_limit(self, prompt: int, teacher_prompt: int) -> int:
        """Most tokens of a completion, behind prompts of so many tokens."""
        limits = [(self.args.max_length, prompt), (context_length(self._student.config), prompt)]
        limits.append((self.teacher_facts.context_length, teacher_prompt))
        most = self.generation_config.max_new_tokens
        return min([most, *(limit - used for limit, used in limits if limit is not None)])

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
        targets = functools.partial(self._targets, self.teacher.read(batch), inputs, student_wrote)
        return self.fused_loss(model, inputs, return_outputs, num_items_in_batch, live_targets=targets)

    @contextlib.contextmanager
    def _targets(
        self, reading: Any, inputs: dict[str, Tensor], student_wrote: bool, device: torch.device
    ) -> Iterator[Targets]:
        """The teacher's distributions for a micro-batch that it has read, on the support that the options ask for."""
        with self.teacher.targets(reading, device) as targets:
            if isinstance(targets, LinearTeacher):
                on: Literal["student", "teacher"] = "student" if self.beta == 1.0 else "teacher"
                targets = dataclasses.replace(targets, top_k=self.args.kd_top_k, on=on)
            if self.rollout_store is not None and student_wrote:
                self.rollout_store.add(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], targets)
            yield targets

    def loss_arguments(self, batch: LossBatch) -> dict[str, Any]:
        """See `ReasoningSFTTrainer.loss_arguments`; adds the teacher's targets, the weights and the divergence."""
        arguments = super().loss_arguments(batch)
        return {
            **arguments,
            "sft_weight": self.args.sft_weight * arguments["sft_weight"],
            "teacher": batch.teacher,
            "kd_weight": self.args.kd_weight * batch.scale.expand(batch.labels.shape),
            "temperature": self.args.kd_temperature,
            "divergence": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd"),
            "beta": self.beta,
            "scale_by_t2": self.args.kd_scale_by_t2,
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
