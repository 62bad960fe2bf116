"""Options of the training stages for accuracy on held-out problems, measured at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from datasets import Dataset

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.trainer.accuracy import HeldOutProblem
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


@dataclass
class AccuracyArguments:
    """Accuracy in the training loop."""

    accuracy_problems: int = field(
        default=0,
        metadata={"help": "Held-out problems answered and verified at each evaluation (eval_math_accuracy); 0: none."},
    )
    accuracy_source: str | None = field(
        default=None,
        metadata={
            "help": "Source of these problems, as of the evaluate stage; default: the evaluation rows, by `answer`."
        },
    )
    accuracy_source_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Options of accuracy_source, such as {"split": "test", "data_dir": "…"}.'},
    )
    accuracy_max_new_tokens: int = field(default=512, metadata={"help": "Such an answer is cut here."})
    accuracy_batch_size: int | None = field(
        default=None, metadata={"help": "Answers written at once on each device. Default: per_device_eval_batch_size."}
    )

    def __post_init__(self) -> None:
        from trl_reasoning_distill.teacher.engines import parse_mapping

        if self.accuracy_problems < 0 or self.accuracy_max_new_tokens < 1:
            raise ValueError(
                f"accuracy_problems={self.accuracy_problems} must not be negative, and "
                f"accuracy_max_new_tokens={self.accuracy_max_new_tokens} must be at least 1."
            )
        if isinstance(self.accuracy_source_options, str):
            self.accuracy_source_options = parse_mapping(self.accuracy_source_options, "accuracy_source_options")

    def check(self, config: ReasoningSFTConfig) -> None:
        """Refuse settings that would fail at the first evaluation, hours from now.

        Raises:
            ValueError: If there are no evaluations, or the best checkpoint is to be chosen by what is not measured.
        """
        if self.accuracy_problems and config.eval_strategy == "no":
            raise ValueError(
                f"accuracy_problems={self.accuracy_problems} with eval_strategy=no: it is measured at evaluations; set eval_strategy and eval_steps."
            )
        metric = config.metric_for_best_model or ""
        if "math_" in metric and not self.accuracy_problems:
            raise ValueError(
                f"metric_for_best_model={metric!r} is measured on held-out problems: set accuracy_problems."
            )

    def attach(self, trainer: ReasoningSFTTrainer, eval_rows: Dataset | None) -> None:
        """Add the callback to a trainer, if it is asked for.

        Raises:
            ValueError: If there is no problem with an answer.
        """
        if not self.accuracy_problems:
            return
        from trl_reasoning_distill.trainer.accuracy import AccuracyCallback

        AccuracyCallback(
            self.load(eval_rows, trainer.format, trainer.args.seed),
            trainer.format,
            max_new_tokens=self.accuracy_max_new_tokens,
            batch_size=self.accuracy_batch_size,
            chat_template_kwargs=trainer.args.template_variables,
        ).attach(trainer)

    def load(self, eval_rows: Dataset | None, form: ReasoningFormat, seed: int) -> list[HeldOutProblem]:
        """The problems: of the source, or the evaluation rows that name their answer."""
        from trl_reasoning_distill.data.sources import load_problems
        from trl_reasoning_distill.trainer.accuracy import HeldOutProblem

        if self.accuracy_source is None:
            return _from_rows(eval_rows or [], self.accuracy_problems)
        options = dict(self.accuracy_source_options or {})  # type: ignore[arg-type]  # a string was parsed above
        problems = load_problems(self.accuracy_source, limit=self.accuracy_problems, seed=seed, **options)
        return [
            HeldOutProblem(form.messages(item.question), item.answer) for item in problems if item.answer is not None
        ]


def _from_rows(rows: Iterable[Mapping[str, Any]], count: int) -> list[HeldOutProblem]:
    """The first `count` rows that have an answer, each asked with its own prompt; a question asked twice counts once."""
    from trl_reasoning_distill.trainer.accuracy import HeldOutProblem

    found: dict[str, HeldOutProblem] = {}
    for row in rows:
        prompt, answer = row.get("prompt"), row.get("answer")
        if isinstance(prompt, list) and answer is not None and len(found) < count:
            found.setdefault(str(prompt), HeldOutProblem(prompt, str(answer)))
    if not found:
        raise ValueError(
            "accuracy_problems: no evaluation row has a `prompt` of messages and an `answer` to verify against. Give accuracy_source, such as "
            "gsm8k, or rows that the verify or select stage wrote."
        )
    return list(found.values())
