"""What the trainers can be told: `SFTConfig`'s fields plus ours, each checked where it is set.

YAML passes values around argparse's choices and types (`kd_top_k: 2.7` arrives as a float), so both classes check themselves and
name the field, the value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from transformers import IntervalStrategy
from trl import ModelConfig, SFTConfig

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.losses.divergence import DIVERGENCES, Support


@dataclass
class ReasoningSFTConfig(SFTConfig):
    """Configuration of `ReasoningSFTTrainer`: every field of TRL's `SFTConfig`, and those below.

    Args:
        reasoning_format: Name of a `ReasoningFormat` preset. It says where the reasoning ends in a completion: for the share of
            examples with reasoning that is logged before the first step, and for `think_weight` and `answer_weight`.
        overlong: What happens to a row longer than `max_length`. `"drop"` leaves it out and counts it; `"truncate"` cuts its end, as
            TRL does, which teaches the model to stop reasoning in the middle.
        malformed_thoughts: What happens to a row whose thought never ends, stands in several blocks, or has nothing after it. `"drop"`
            leaves it out, counts and lists it; `"train"` trains it as it is.
        think_weight: Weight of the negative log-likelihood of each token up to and including the end of the reasoning.
        answer_weight: The same for the tokens after it.
        use_kl_regularization: Add `kl_coef` times the KL divergence to the model as it was before training. Off by default, so that
            this trainer is TRL's until asked; the recipes that publish it switch it on with `kl_coef=0.1`.
        kl_coef: Coefficient of that term.
        kl_direction: `"reverse"` is KL(student ‖ reference), `"forward"` is KL(reference ‖ student).
        kl_target: Adapt the coefficient, from `kl_coef` on, so that the KL stays near this many nats per token; `None` keeps it.
        reference_logits: Path of a Top-K store captured from the student before training. It takes the place of a second model, and of the
            forward with the adapter off; the KL is then the one on its K + 1 buckets.
        add_think_tokens: Make each tag of `reasoning_format` one token of the vocabulary, where it is not yet. The student is then written
            once, with rows for them, to `base_model/` below `output_dir`, and trained from there; an adapter trains these rows too.
        early_stopping_patience: Stop when `metric_for_best_model` has not improved at so many evaluations in a row; `None` never does.
        chat_template_kwargs: Variables for the chat template of every row, such as `{"enable_thinking": True}`; a row's own column of
            this name wins.
        preview_examples: How many training examples are shown, with their supervised tokens marked, when training starts.
        allow_changed_resume: Go on from a checkpoint although it is damaged, or was trained on other data, in other batches, on other
            ranks or under another schedule. Otherwise that is refused, because it would be another training without a word.

    Raises:
        ValueError: If a field holds a value that it cannot, or `label_smoothing_factor` is set.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012  # what may come as JSON text

    reasoning_format: str = field(
        default="think",
        metadata={
            "help": "Preset of ReasoningFormat that the completions are written in: think, gsm8k, boxed, final_answer or plain."
        },
    )
    overlong: str = field(
        default="drop",
        metadata={
            "help": "Rows longer than max_length: 'drop' them (counted and logged) or 'truncate' them.",
            "choices": ["drop", "truncate"],
        },
    )
    malformed_thoughts: str = field(
        default="drop",
        metadata={
            "help": "Rows whose thought never ends, stands in several blocks, or has nothing after it: 'drop' them (counted and listed) "
            "or 'train' them as they are.",
            "choices": ["drop", "train"],
        },
    )
    think_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on each token of the reasoning."})
    answer_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss on each token after the reasoning."}
    )
    use_kl_regularization: bool = field(
        default=False, metadata={"help": "Add kl_coef times the KL divergence to the model as it was before training."}
    )
    kl_coef: float = field(default=0.1, metadata={"help": "Coefficient of the KL divergence to the reference."})
    kl_direction: str = field(
        default="reverse",
        metadata={
            "help": "'reverse': KL(student || reference); 'forward': KL(reference || student).",
            "choices": ["reverse", "forward"],
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Adapt the coefficient so that the KL stays near this many nats per token; unset keeps it."},
    )
    reference_logits: str | None = field(
        default=None,
        metadata={"help": "Top-K store captured from the student before training: the reference without a model."},
    )
    add_think_tokens: bool = field(
        default=False, metadata={"help": "Make each tag of reasoning_format one token, with trained rows of its own."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Variables for the chat template of every row, such as {"enable_thinking": true}.'},
    )
    preview_examples: int = field(
        default=3, metadata={"help": "Training examples shown, supervised tokens marked, when training starts."}
    )
    allow_changed_resume: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint all the same if it is damaged or was trained under other settings."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ReasoningFormat.preset(self.reasoning_format)  # raises with the list of presets
        check_choice("overlong", self.overlong, ("drop", "truncate"))
        check_choice("malformed_thoughts", self.malformed_thoughts, ("drop", "train"))
        check_choice("kl_direction", self.kl_direction, ("reverse", "forward"))
        for name in ("think_weight", "answer_weight", "kl_coef"):
            check_number(name, getattr(self, name), minimum=0.0)
        check_bool("use_kl_regularization", self.use_kl_regularization)
        check_bool("allow_changed_resume", self.allow_changed_resume)
        self._check_reference()
        check_bool("add_think_tokens", self.add_think_tokens)
        check_number("preview_examples", self.preview_examples, minimum=0, kind=int)
        self._check_early_stopping()
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}`: must be 0. Smoothing mixes the labels with a uniform distribution "
                "over the whole vocabulary, which the fused head never builds; Top-K targets from a teacher are the better soft labels."
            )

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        check_number("early_stopping_patience", self.early_stopping_patience, minimum=1, kind=int)
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
        if self.kl_target is not None:
            check_number("kl_target", self.kl_target, above=0.0)
            check_number("kl_coef", self.kl_coef, above=0.0)  # what is multiplied would stay zero
        if self.reference_logits is not None:
            if not isinstance(self.reference_logits, (str, Path)):
                raise ValueError(f"`reference_logits={self.reference_logits!r}`: must be the path of a Top-K store.")
            self.reference_logits = str(self.reference_logits)
            self._check_whole_rows()

    def _check_whole_rows(self) -> None:
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={self.packing_strategy!r}`: must be 'bfd' with targets from a store. The other strategies cut rows in two, and "
                "the targets hold only in the context they were captured in."
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


@dataclass
class TopKDistillConfig(ReasoningSFTConfig):
    """Configuration of `TopKDistillTrainer`: every field of `ReasoningSFTConfig`, and those below.

    The defaults of `kd_top_k`, `kd_temperature` and `kd_weight` are the GSM8K recipe's published ones; its support is `"renormalized"`.

    Args:
        teacher_logits: Path of the Top-K store that `capture` (and, for another vocabulary, `align`) wrote. Required.
        kd_top_k: How many of the store's ids per position are used, most likely first.
        kd_temperature: Temperature T of both distributions in the divergence; the store must hold its log-sum-exp.
        kd_weight: α, the weight of the distillation loss once the warm-up is over.
        kd_warmup_ratio: Share of all optimizer steps over which α rises linearly from 0.
        kd_warmup_steps: The same in steps; takes precedence where set.
        kd_divergence: A name in `losses.divergence.DIVERGENCES`: `"forward_kl"` KL(teacher ‖ student), `"reverse_kl"` or `"jsd"`, the
            generalised Jensen–Shannon divergence.
        kd_beta: β of `"jsd"`, strictly between 0 and 1.
        kd_support: `"tail"` compares K + 1 buckets, `"renormalized"` the K ids alone, scaled to mass 1 on both sides.
        kd_top_p: Use only the fewest ids whose teacher mass reaches this; 1 uses all `kd_top_k`.
        kd_scale_by_t2: Multiply the divergence by T², so that its gradient keeps its size as T changes.
        kd_weight_column: Column of the dataset with one weight per example for the distillation loss.

    Raises:
        ValueError: If a field holds a value that it cannot, or a combination that has no meaning.
    """

    teacher_logits: str | None = field(
        default=None, metadata={"help": "Path of the Top-K store with the teacher's log-probabilities."}
    )
    kd_top_k: int = field(
        default=10, metadata={"help": "Number of the teacher's ids used per position, most likely first."}
    )
    kd_temperature: float = field(
        default=2.0, metadata={"help": "Temperature of both distributions in the divergence."}
    )
    kd_weight: float = field(default=0.35, metadata={"help": "Weight of the distillation loss after the warm-up."})
    kd_warmup_ratio: float = field(
        default=0.1, metadata={"help": "Share of all steps over which the weight rises linearly from 0."}
    )
    kd_warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps of that warm-up; takes precedence over the ratio."}
    )
    kd_divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence between teacher and student.", "choices": list(DIVERGENCES)},
    )
    kd_beta: float = field(
        default=0.5, metadata={"help": "Interpolation of the generalised Jensen-Shannon divergence, in (0, 1)."}
    )
    kd_support: str = field(
        default="tail",
        metadata={
            "help": "'tail': the K ids and one bucket for the rest; 'renormalized': the K ids alone.",
            "choices": list(get_args(Support)),
        },
    )
    kd_top_p: float = field(default=1.0, metadata={"help": "Use the fewest ids whose teacher mass reaches this."})
    kd_scale_by_t2: bool = field(default=True, metadata={"help": "Multiply the divergence by the squared temperature."})
    kd_weight_column: str | None = field(
        default=None, metadata={"help": "Dataset column with one distillation weight per example."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.teacher_logits, (str, Path)):
            raise ValueError(
                f"`teacher_logits={self.teacher_logits!r}`: must be the path of a Top-K store. Run `trl-distill capture` with the teacher first."
            )
        self.teacher_logits = str(self.teacher_logits)
        check_number("kd_top_k", self.kd_top_k, minimum=1, kind=int)
        check_number("kd_temperature", self.kd_temperature, above=0.0)
        check_number("kd_weight", self.kd_weight, minimum=0.0)
        check_number("kd_warmup_ratio", self.kd_warmup_ratio, minimum=0.0, maximum=1.0)
        if self.kd_warmup_steps is not None:
            check_number("kd_warmup_steps", self.kd_warmup_steps, minimum=0, kind=int)
        check_choice("kd_divergence", self.kd_divergence, tuple(DIVERGENCES))
        check_choice("kd_support", self.kd_support, get_args(Support))
        check_number("kd_beta", self.kd_beta, above=0.0, below=1.0)
        check_number("kd_top_p", self.kd_top_p, above=0.0, maximum=1.0)
        check_bool("kd_scale_by_t2", self.kd_scale_by_t2)
        if self.kd_support == "renormalized" and self.kd_divergence != "forward_kl":
            raise ValueError(
                f"`kd_support='renormalized'` with `kd_divergence={self.kd_divergence!r}`: without the tail bucket this divergence does not see the "
                "mass that the student puts outside the teacher's Top-K and drives it there. Use `kd_support: tail`."
            )
        self._check_whole_rows()


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}={value!r}`: must be one of {', '.join(repr(choice) for choice in allowed)}.")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}={value!r}`: must be true or false, found {type(value).__name__}.")


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    kind: type = float,
) -> None:
    """Refuse a value of the wrong type or outside `[minimum, maximum]` and `(above, below)`."""
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (("≥", minimum), (">", above), ("≤", maximum), ("<", below))
        if bound is not None
    ]
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(bounds)}".strip()
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not is_number:
        raise ValueError(f"`{name}={value!r}`: must be {wanted}, found {type(value).__name__}.")
    fits = (
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        raise ValueError(f"`{name}={value!r}`: must be {wanted}.")


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

    Args:
        lora_preset: The LoRA settings of a published recipe, one of `LORA_PRESETS`; implies `use_peft`. What is set beside it wins.
        merge: Also write `merged_model/`, the base model in full precision with the adapter merged in.

    Raises:
        ValueError: If the preset is unknown, or an option needs an adapter that is not asked for.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA. Default: the preset's, or TRL's 16."})  # type: ignore[assignment]
    lora_alpha: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "LoRA's alpha. Default: the preset's, or TRL's 32."}
    )
    lora_dropout: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "LoRA's dropout. Default: the preset's, or TRL's 0.05."}
    )
    lora_preset: str | None = field(
        default=None,
        metadata={
            "help": "LoRA settings by name: cot_lora (r 8) or tinyllama (r 32). Implies use_peft; explicit keys win."
        },
    )
    merge: bool = field(
        default=False,
        metadata={"help": "Also write merged_model/: the full-precision base with the adapter merged in."},
    )

    def __post_init__(self) -> None:
        settings = dict(_TRL_DEFAULTS)
        if self.lora_preset is not None:
            if self.lora_preset not in LORA_PRESETS:
                near = difflib.get_close_matches(self.lora_preset, LORA_PRESETS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"`lora_preset={self.lora_preset!r}`: there are {', '.join(LORA_PRESETS)}.{hint}")
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
