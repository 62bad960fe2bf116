"""`StudentConfig`: TRL's `ModelConfig` with LoRA settings by name, and whether the adapter is merged at the end."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from trl import ModelConfig

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
