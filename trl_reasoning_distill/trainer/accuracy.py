"""Accuracy in the training loop: held-out problems are answered and verified at every evaluation.

What it measures joins the evaluation's metrics before anybody reads them, so `metric_for_best_model: math_accuracy`,
`load_best_model_at_end` and early stopping work with it as they do with the loss. Training is not touched: decoding is greedy, random
states and modes are put back, and the weights afterwards are, bit by bit, those of a training without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.teacher.sampling import Engine, SamplingConfig
from trl_reasoning_distill.teacher.sampling.loop import draw_and_judge
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine
from trl_reasoning_distill.trainer.callbacks import show_samples
from trl_reasoning_distill.trainer.trl_bridge import unwrap_model_for_generation

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class HeldOutProblem:
    """A question that is not trained on.

    Attributes:
        messages: The conversation that asks it.
        answer: The gold answer.
    """

    messages: Messages
    answer: str


@dataclasses.dataclass(frozen=True)
class _Answered:
    """An answer to the problem with this index, and what was found in it."""

    index: int
    text: str
    extracted_answer: str | None
    status: str
    is_truncated: bool
    is_well_formed: bool


class AccuracyCallback(TrainerCallback):
    """Answers held-out problems at each evaluation, all ranks together, and adds what it finds to the metrics.

    Logged: `eval_math_accuracy`, the share of all problems with an answer verified as correct; `eval_math_undecided`, of answers that could
    not be verified in time; `eval_math_truncated`, cut at `max_new_tokens`; `eval_math_no_answer`, without anything to verify;
    `eval_math_well_formed`, in the format they are trained on. A few samples go to the console and the trackers.

    Works under DDP, ZeRO-3 and FSDP2; there every rank answers equally many, so that all step together.

    Args:
        problems: What to answer.
        response_format: What a well-formed answer looks like.
        max_new_tokens: An answer is cut here.
        batch_size: Answers written at once on each rank; `None` takes `per_device_eval_batch_size`.
        chat_template_kwargs: Variables for the chat template.
        samples: How many answers are shown.
        timeout: Seconds that verifying one answer may take.

    Raises:
        ValueError: If there is no problem, or a number is out of range.

    Example:
        >>> AccuracyCallback(held_out, ReasoningFormat.preset("think")).attach(trainer)
        >>> trainer.train()
    """

    def __init__(
        self,
        problems: Sequence[HeldOutProblem],
        response_format: ReasoningFormat,
        *,
        max_new_tokens: int = 512,
        batch_size: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        samples: int = 4,
        timeout: float = 2.0,
    ) -> None:
        if not problems:
            raise ValueError("There is no held-out problem to measure the accuracy on.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: an answer needs at least one token.")
        self.problems = list(problems)
        self.response_format = response_format
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.samples = samples
        self.timeout = timeout
        self.trainer: Any = None
        self._measured: tuple[int, dict[str, float]] | None = None

    def attach(self, trainer: Any) -> AccuracyCallback:
        """Add this to a trainer, before the callbacks that read the metrics, such as early stopping."""
        self.trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, once per step however many evaluation sets there are, and log."""
        if self._measured is None or self._measured[0] != state.global_step:
            answered = self._answer_all()
            self._measured = (state.global_step, self._summarize(answered))
            self.trainer.log(dict(self._measured[1]))
            self._show(answered, self._measured[1]["eval_math_accuracy"])
        if metrics is not None:
            metrics.update(self._measured[1])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget what was measured before this step."""
        self._measured = None

    def _answer_all(self) -> list[_Answered]:
        """All answers in order, on every rank."""
        accelerator = self.trainer.accelerator
        per_rank = math.ceil(len(self.problems) / accelerator.num_processes)
        # Ranks that share weights generate in step, so each has the same number; what wraps around is answered twice, counted once
        first = accelerator.process_index * per_rank
        mine = [index % len(self.problems) for index in range(first, first + per_rank)]
        asked = [(Problem(str(i), _question(self.problems[i]), self.problems[i].answer, "held-out"), 0) for i in mine]
        with torch.random.fork_rng(enabled=True, devices=_devices(accelerator.device)), self._engine() as engine:
            chunks = draw_and_judge(
                engine,
                [asked],
                lambda problem: [dict(message) for message in self.problems[int(problem.id)].messages],
                SamplingConfig(self.max_new_tokens),
                response_format=self.response_format,
                timeout=self.timeout,
            )
            samples = [sample for chunk in chunks for sample in chunk]
        answered = [
            _Answered(
                index=int(sample.problem.id),
                text=sample.output.text,
                extracted_answer=sample.verdict.extracted,
                status=sample.verdict.status,
                is_truncated=sample.output.finish_reason == "length",
                is_well_formed=self.response_format.parse(sample.output.text).well_formed,
            )
            for sample in samples
        ]
        by_index = {item.index: item for item in gather_object(answered)}
        return [by_index[index] for index in range(len(self.problems))]

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Engine]:
        """The model as it is trained, in evaluation mode and, where ranks share it, gathered."""
        trainer = self.trainer
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            yield TransformersEngine(
                model,
                trainer.processing_class,
                max_batch_size=self.batch_size or trainer.args.per_device_eval_batch_size,
                chat_template_kwargs=self.chat_template_kwargs,
                in_step=self._gathers_in_forward,
            )

    @property
    def _gathers_in_forward(self) -> bool:
        """Whether a forward needs the other ranks, so that one that is done must go on with them; ZeRO-3's weights are whole by then."""
        return bool(self.trainer.is_fsdp_enabled and self.trainer.accelerator.num_processes > 1)

    def _summarize(self, answered: Sequence[_Answered]) -> dict[str, float]:
        shares = {
            "accuracy": [item.status == "correct" for item in answered],
            "undecided": [item.status == "undecided" for item in answered],
            "truncated": [item.is_truncated for item in answered],
            "no_answer": [item.extracted_answer is None for item in answered],
            "well_formed": [item.is_well_formed for item in answered],
        }
        return {f"eval_math_{name}": sum(found) / len(answered) for name, found in shares.items()}

    def _show(self, answered: Sequence[_Answered], accuracy: float) -> None:
        step = self.trainer.state.global_step
        rows = [
            {
                "step": step,
                "question": _question(self.problems[item.index]),
                "completion": item.text,
                "extracted_answer": item.extracted_answer,
                "gold_answer": self.problems[item.index].answer,
                "verdict": item.status,
            }
            for item in answered[: self.samples]
        ]
        title = f"step {step:,}: {accuracy:.1%} of {len(answered):,} held-out problems answered correctly"
        show_samples(rows, self.trainer, name="math_samples", title=title)


def _question(problem: HeldOutProblem) -> str:
    return problem.messages[-1]["content"]


def _devices(device: torch.device) -> list[int]:
    """The accelerators whose random state is to be put back."""
    return [torch.cuda.current_device()] if device.type == "cuda" else []
