"""What can be known of a recipe's stages without a weight being read: options, configurations, tokenizers, rows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.doctor.memory import TrainingShape, adapter_parameters
from trl_reasoning_distill.pipeline import RecipeStage
from trl_reasoning_distill.scripts.stage import apply_config

TRAINING = ("sft", "distill", "gkd")
SAMPLE_ROWS = 200
_FOUR_BIT = 0.52  # NF4 with double quantisation: 4 bits, and about 0.13 of a bit for the scales


class UnknownModelError(Exception):
    """A model's configuration or tokenizer cannot be had here."""


@dataclass(frozen=True)
class StageFacts:
    """One stage with its options, the recipe's and the defaults."""

    item: RecipeStage
    options: SimpleNamespace

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.item.name

    @property
    def is_training(self) -> bool:
        """Whether it trains a student."""
        return self.item.script in TRAINING

    def get(self, name: str, default: Any = None) -> Any:
        """An option, or the default if this stage has none of that name."""
        return getattr(self.options, name, default)

    @property
    def models(self) -> dict[str, str]:
        """The models that it reads, by role."""
        if self.is_training:
            teacher = {"teacher": self.get("teacher_model_name_or_path")}
            return {"student": self.get("model_name_or_path"), **{k: v for k, v in teacher.items() if v}}
        if self.item.script == "evaluate":
            models = self.get("models")
            if isinstance(models, Mapping):
                return {str(name): str(path) for name, path in models.items()}
            return dict(word.split("=", 1) for word in models)
        model = self.get("model")
        return {"model": model} if model else {}

    @cached_property
    def rows_path(self) -> Path | None:
        """The rows it trains on or reads, if they are on this disk by now."""
        for name in ("dataset_path", "dataset"):
            if value := self.get(name):
                path = Path(value)
                path = path / "train.jsonl" if path.is_dir() else path
                return path if path.is_file() else None
        return None

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """Its first rows, if they are on this disk."""
        return list(islice(read_jsonl(self.rows_path), SAMPLE_ROWS)) if self.rows_path else []

    def training_shape(self, resources: Resources) -> TrainingShape:
        """What of its options decides its memory."""
        get = self.get
        four_bit, eight_bit = bool(get("load_in_4bit")), bool(get("load_in_8bit"))
        dtype = {"bfloat16": 2, "float16": 2, "float32": 4}.get(str(get("dtype")), 4)
        trainable = None
        if get("use_peft"):
            config = resources.config(get("model_name_or_path"))
            trainable = adapter_parameters(
                config, int(get("lora_r")), get("lora_target_modules"), get("lora_modules_to_save")
            )
        uses_reference = bool(get("use_kl_regularization")) and trainable is None and not get("reference_logits")
        return TrainingShape(
            batch=int(get("per_device_train_batch_size")),
            length=int(get("max_length") or 1024),
            weight_bytes=_FOUR_BIT if four_bit else 1 if eight_bit else dtype,
            compute_bytes=2 if (get("bf16") is not False or get("fp16")) else 4,
            checkpointing=get("gradient_checkpointing") is not False,
            accumulates=int(get("gradient_accumulation_steps") or 1) > 1,
            trainable=trainable,
            optimizer=str(get("optim")),
            frozen_reference=uses_reference,
        )


class Resources:
    """Configurations and tokenizers, loaded once each."""

    def __init__(self, *, trust_remote_code: bool = False) -> None:
        self._trust = trust_remote_code
        self._configs: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}

    def config(self, model: str) -> Any:
        """A model's configuration; of an adapter, that of its base.

        Raises:
            UnknownModelError: If it cannot be had.
        """
        from transformers import AutoConfig

        return self._load(self._configs, AutoConfig, model)

    def has_config(self, model: str) -> bool:
        """Whether its configuration can be had."""
        try:
            self.config(model)
        except UnknownModelError:
            return False
        return True

    def tokenizer(self, model: str) -> Any:
        """A model's tokenizer.

        Raises:
            UnknownModelError: If it cannot be had.
        """
        from transformers import AutoTokenizer

        return self._load(self._tokenizers, AutoTokenizer, model)

    def _load(self, cache: dict[str, Any], loader: Any, model: str) -> Any:
        if model not in cache:
            try:
                cache[model] = loader.from_pretrained(model, trust_remote_code=self._trust)
            except (OSError, ValueError) as error:
                cache[model] = UnknownModelError(f"{model}: {str(error).strip().splitlines()[0]}")
        if isinstance(cache[model], UnknownModelError):
            raise cache[model]
        return cache[model]


def read_facts(item: RecipeStage) -> StageFacts:
    """A stage's options through its own parser.

    The options are not made into its dataclasses: `TrainingArguments` refuses, on a laptop, what only a GPU can do.

    Raises:
        ValueError: If an option is unknown or does not fit.
    """
    parser = importlib.import_module(f"trl_reasoning_distill.scripts.{item.script}").make_parser()
    environment = {key: value for key, value in item.options.items() if key != "env"}
    apply_config(parser, environment, str(item.source))
    values = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    return StageFacts(item, SimpleNamespace(**values))
