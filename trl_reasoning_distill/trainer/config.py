"""Options of the trainers: those of TRL's `SFTConfig`, and ours."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from transformers import IntervalStrategy, TrainingArguments
from trl import ModelConfig, SFTConfig

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.losses.divergence import DIVERGENCES, Support
from trl_reasoning_distill.options import (
    Bounds,
    Count,
    CountOrZero,
    NonNegative,
    OneOf,
    Positive,
    PositiveShare,
    Share,
    check_options,
    option,
)
from trl_reasoning_distill.trainer.trl_bridge import JSON_FIELDS


def formerly(**names: str) -> Callable[[type], type]:
    """Let a configuration take options in Python by the names of version 0.1.0, with a warning; `scripts.command` does so for YAML and the command line.

    Args:
        names: The name now, by the name then.
    """

    def decorate(config_class: Any) -> Any:
        init = config_class.__init__

        @functools.wraps(init)
        def with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in names.keys() & kwargs.keys():
                warnings.warn(f"The option `{old}` is called `{names[old]}` now.", FutureWarning, stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            init(self, *args, **kwargs)

        config_class.__init__ = with_old_names
        return config_class

    return decorate


@dataclass
class ReasoningSFTConfig(SFTConfig):
    """Configuration of `ReasoningSFTTrainer`: every field of TRL's `SFTConfig`, and those below.

    Raises:
        ValueError: If a field holds a value that it cannot, or a combination that has no meaning.
    """

    _VALID_DICT_FIELDS = [*JSON_FIELDS, "chat_template_kwargs"]  # noqa: RUF012  # what may come as JSON text

    reasoning_format: str = option(
        "think",
        "Preset of ReasoningFormat that the completions are written in: think, gsm8k, boxed, final_answer or plain. It says where the "
        "reasoning ends, for think_weight, answer_weight and the share of rows with reasoning.",
    )
    overlong: Literal["drop", "truncate"] = option(
        "drop",
        "Rows longer than max_length: drop them, counted and logged; or truncate them as TRL does, which teaches the model to stop "
        "reasoning in the middle.",
    )
    malformed_thoughts: Literal["drop", "train"] = option(
        "drop",
        "Rows whose thought never ends, stands in several blocks, or has nothing after it: drop them, counted and listed; or train them "
        "as they are.",
    )
    think_weight: NonNegative = option(
        1.0, "Weight of the cross-entropy on each token up to and including the end of the reasoning."
    )
    answer_weight: NonNegative = option(1.0, "Weight of the cross-entropy on each token after the reasoning.")
    use_kl_regularization: bool = option(
        False, "Add kl_coef times the KL divergence to the model as it was before training."
    )
    kl_coef: NonNegative = option(0.1, "Coefficient of that term.")
    kl_direction: Literal["reverse", "forward"] = option(
        "reverse", "reverse is KL(student || reference), forward is KL(reference || student)."
    )
    kl_target: Positive | None = option(
        None,
        "Adapt the coefficient, from kl_coef on, so that the KL stays near this many nats per token; unset keeps it.",
    )
    reference_logits: str | None = option(
        None,
        "Top-K store captured from the student before training: the reference without a second model or forward. The KL is then the "
        "one on its K + 1 buckets.",
    )
    add_think_tokens: bool = option(
        False,
        "Make each tag of reasoning_format one token, where it is not yet. The student is then written once with rows for them, to "
        "base_model/ below output_dir, and trained from there; an adapter trains these rows too.",
    )
    early_stopping_patience: Count | None = option(
        None, "Stop after so many evaluations in a row without a better metric_for_best_model; unset never does."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        'Variables for the chat template of every row, such as {"enable_thinking": true}. A row\'s own column of this name wins.',
    )
    preview_examples: CountOrZero = option(
        3, "Training examples shown, supervised tokens marked, when training starts."
    )
    allow_changed_resume: bool = option(
        False, "Resume from a checkpoint also where it is damaged or was trained on other data or under other settings."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        ReasoningFormat.preset(self.reasoning_format)  # raises with the list of presets
        self._check_reference()
        self._check_early_stopping()
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}`: must be 0. It is deprecated in TRL and will be removed in v2.0.0: label smoothing "
                "needs the full logits, which the fused head never builds. Top-K targets from a teacher are the better soft labels."
            )
        self._check_truncation()

    def _check_truncation(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"`truncation_mode={self.truncation_mode!r}`: must be one of 'keep_start', 'keep_end'.")
        if self.truncation_mode == "keep_end":
            reasons = {
                "`overlong='drop'`: rows longer than max_length are left out, none is cut. Set overlong: truncate": (
                    self.overlong == "drop" and self.max_length is not None
                ),
                "`packing`: TRL cuts packed rows at their end": self.packing,
            }
            for reason, is_refused in reasons.items():
                if is_refused:
                    raise ValueError(
                        f"`truncation_mode='keep_end'` has no effect with {reason}, or leave truncation_mode out."
                    )

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        if self.eval_strategy == "no" or not self.metric_for_best_model:
            raise ValueError(
                f"`early_stopping_patience={self.early_stopping_patience}` with eval_strategy={IntervalStrategy(self.eval_strategy).value!r} and "
                f"metric_for_best_model={self.metric_for_best_model!r}: it needs evaluations and what they are to improve. Set eval_strategy, "
                "and load_best_model_at_end or metric_for_best_model ('loss', 'math_accuracy')."
            )

    def _check_reference(self) -> None:
        for name in ("kl_target", "reference_logits"):
            if getattr(self, name) is not None and not self.use_kl_regularization:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` without the KL term: set use_kl_regularization: true, or leave it out."
                )
        if self.kl_target is not None and not self.kl_coef > 0:
            raise ValueError(f"`kl_coef={self.kl_coef!r}`: must be a number > 0 with kl_target, which multiplies it.")
        if self.reference_logits is not None:
            self.reference_logits = str(self.reference_logits)
            self._check_whole_rows()

    def _check_whole_rows(self) -> None:
        """Targets from a store hold only in the context that they were captured in."""
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={self.packing_strategy!r}`: must be 'bfd' with targets from a store. The other strategies cut rows in two, and "
                "the targets hold only in the context they were captured in."
            )
        if self.truncation_mode == "keep_end":
            raise ValueError(
                "`truncation_mode='keep_end'`: must be 'keep_start' with targets from a store, which hold only in the context they were "
                "captured in."
            )

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, once more as a mapping."""
        assert not isinstance(self.chat_template_kwargs, str)  # JSON was parsed in `__post_init__`
        return self.chat_template_kwargs or {}

    @property
    def has_segment_weights(self) -> bool:
        """Whether tokens of the reasoning and of the answer are weighted at all."""
        return (self.think_weight, self.answer_weight) != (1.0, 1.0)


@formerly(top_k="kd_top_k")
@dataclass
class TopKDistillConfig(ReasoningSFTConfig):
    """Configuration of `TopKDistillTrainer`: every field of `ReasoningSFTConfig`, and those below.

    The defaults of `kd_top_k`, `kd_temperature` and `kd_weight` are the GSM8K recipe's published ones; its support is `"renormalized"`.

    Raises:
        ValueError: If a field holds a value that it cannot, or a combination that has no meaning.
    """

    teacher_logits: str | None = option(None, "Path of the Top-K store with the teacher's log-probabilities. Required.")
    kd_top_k: Count = option(10, "Number of the teacher's ids used per position, most likely first.")
    kd_temperature: Positive = option(
        2.0, "Temperature of both distributions in the divergence; the store must hold its log-sum-exp."
    )
    kd_weight: NonNegative = option(0.35, "Weight of the distillation loss after the warm-up.")
    kd_warmup_ratio: Share = option(0.1, "Share of all steps over which the weight rises linearly from 0.")
    kd_warmup_steps: CountOrZero | None = option(None, "Steps of that warm-up; takes precedence over the ratio.")
    kd_divergence: Annotated[str, OneOf(DIVERGENCES)] = option(
        "forward_kl",
        "Divergence between teacher and student: forward_kl is KL(teacher || student), reverse_kl the other way, jsd the generalised "
        "Jensen-Shannon divergence.",
    )
    kd_beta: Annotated[float, Bounds(gt=0, lt=1)] = option(0.5, "Interpolation of jsd.")
    kd_support: Support = option(
        "tail",
        "tail compares K + 1 buckets: the K ids and the rest; renormalized the K ids alone, scaled to mass 1 on both sides.",
    )
    kd_top_p: PositiveShare = option(1.0, "Use the fewest ids whose teacher mass reaches this; 1 uses all kd_top_k.")
    kd_scale_by_t2: bool = option(
        True, "Multiply the divergence by the squared temperature, so that its gradient keeps its size as that changes."
    )
    kd_weight_column: str | None = option(None, "Dataset column with one distillation weight per example.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_logits is None:
            raise ValueError(
                "`teacher_logits=None`: must be the path of a Top-K store. Run `trl-distill capture` with the teacher first."
            )
        self.teacher_logits = str(self.teacher_logits)
        if self.kd_support == "renormalized" and self.kd_divergence != "forward_kl":
            raise ValueError(
                f"`kd_support='renormalized'` with `kd_divergence={self.kd_divergence!r}`: without the tail bucket this divergence does not see the "
                "mass that the student puts outside the teacher's Top-K and drives it there. Use `kd_support: tail`."
            )
        self._check_whole_rows()


def convert_config(args: Any, config_class: type[ReasoningSFTConfig]) -> Any:
    """A trainer's configuration from any that TRL or transformers has.

    Args:
        args: An instance of `config_class`, which is returned as it is; another `TrainingArguments` whose fields it has; or `None`
            for the defaults.
        config_class: The class that the trainer needs.

    Raises:
        ValueError: If `args` is something else, or has fields or values that `config_class` does not take.
    """
    if isinstance(args, config_class):
        return args
    needed = f"`args`: the trainer needs a {config_class.__name__}"
    if args is None:
        return config_class(output_dir="trainer_output")
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"{needed}, found {type(args).__name__}.")
    # Not `to_dict`, which hides the value of each name that ends with `_token`, such as `eos_token`
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    unknown = sorted(values.keys() - config_class.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{needed}, which has no {', '.join(unknown)}; found {type(args).__name__}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what is deprecated, `args` has warned itself
        try:
            return config_class(**values)
        except ValueError as error:
            raise ValueError(f"{needed}, found {type(args).__name__}. {error}") from None


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

LORA_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cot_lora": {
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_target_modules": [*_ATTENTION, "up_proj", "down_proj"],
        },
        "tinyllama": {
            "lora_r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.1,
            "lora_target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"],
        },
    }
)
_TRL_DEFAULTS = MappingProxyType(
    {name: ModelConfig.__dataclass_fields__[name].default for name in ("lora_r", "lora_alpha", "lora_dropout")}
)


@dataclass
class StudentConfig(ModelConfig):
    """The model that is trained: every field of TRL's `ModelConfig`, and those below.

    Raises:
        ValueError: If the preset is unknown, or an option needs an adapter that is not asked for.
    """

    lora_r: Count | None = option(None, "Rank of LoRA. Default: the preset's, or TRL's 16.")  # type: ignore[assignment]
    lora_alpha: int | None = option(None, "LoRA's alpha. Default: the preset's, or TRL's 32.")  # type: ignore[assignment]
    lora_dropout: Share | None = option(None, "LoRA's dropout. Default: the preset's, or TRL's 0.05.")  # type: ignore[assignment]
    lora_preset: Annotated[str, OneOf(tuple(LORA_PRESETS))] | None = option(
        None,
        "LoRA settings of a published recipe: cot_lora (r 8) or tinyllama (r 32). Implies use_peft; explicit keys win.",
    )
    merge: bool = option(False, "Also write merged_model/: the base in full precision with the adapter merged into it.")

    def __post_init__(self) -> None:
        check_options(self)
        settings = dict(_TRL_DEFAULTS)
        if self.lora_preset is not None:
            self.use_peft = True
            settings |= LORA_PRESETS[self.lora_preset]
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError(
                "A quantised model cannot be trained as a whole: set use_peft: true, or give a lora_preset."
            )
        if self.merge and not self.use_peft:
            raise ValueError("`merge` merges an adapter into its base: set use_peft: true, or leave merge out.")
