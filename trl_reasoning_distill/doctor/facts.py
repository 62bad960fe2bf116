"""What can be known of a recipe's stages without a weight being read: options, configurations, tokenizers, rows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.doctor.memory import LiveTeacher, TrainingShape, adapter_parameters, model_shape
from trl_reasoning_distill.hub import load_config, load_tokenizer
from trl_reasoning_distill.pipeline import RecipeStage
from trl_reasoning_distill.scripts.evaluate import parse_models
from trl_reasoning_distill.scripts.planning import student_config
from trl_reasoning_distill.scripts.stage import apply_config
from trl_reasoning_distill.terminal import GREEN, RED, YELLOW, paint

TRAINING = ("sft", "distill", "gkd")
DEFAULT_KEY = "OPENAI_API_KEY"
SAMPLE_ROWS = 200
_FOUR_BIT = 0.52  # NF4 with double quantisation: 4 bits, and about 0.13 of a bit for the scales


class UnknownModelError(Exception):
    """A model's configuration or tokenizer cannot be had here."""


@dataclass(frozen=True)
class ServedModel:
    """A model behind a server.

    Attributes:
        model: The name it has there.
        url: The server.
        key_variable: Environment variable that holds the key.
    """

    model: str
    url: str
    key_variable: str


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

    @cached_property
    def served(self) -> dict[str, ServedModel]:
        """The models that it asks of a server, by role."""
        get = self.get
        if self.is_training:
            url, name = get("teacher_server_url"), get("teacher_model_name_or_path")
            return {"teacher": ServedModel(str(name), url, DEFAULT_KEY)} if url else {}
        found = {}
        for role, (model, own) in self._asked.items():
            engine, url, key = (own.get(name) or get(name) for name in ("engine", "base_url", "api_key_env"))
            if engine == "openai":
                found[role] = ServedModel(model, url or "$OPENAI_BASE_URL", key or DEFAULT_KEY)
        return found

    @cached_property
    def models(self) -> dict[str, str]:
        """The models that it loads, by role."""
        if self.is_training:
            teacher = {"teacher": self.get("teacher_model_name_or_path")} if not self.served else {}
            return {"student": self.get("model_name_or_path"), **{k: v for k, v in teacher.items() if v}}
        return {role: model for role, (model, _) in self._asked.items() if role not in self.served}

    @cached_property
    def _asked(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Models that are not trained, by role, each with engine options of its own."""
        if self.item.script == "evaluate":
            return {name: (spec.model, spec.options) for name, spec in parse_models(self.get("models")).items()}
        model = self.get("model")
        return {"model": (str(model), {})} if model else {}

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

    @property
    def prompts(self) -> list[str]:
        """The questions of its first rows, as text."""
        prompts = (row.get("prompt") or (row.get("messages") or [])[:-1] for row in self.sample)
        return [each if isinstance(each, str) else str(each[-1]["content"]) for each in prompts if each]

    def training_shape(self, resources: Resources, *, cuda: bool = True) -> TrainingShape:
        """What of its options decides its memory."""
        get = self.get
        four_bit, eight_bit = bool(get("load_in_4bit")), bool(get("load_in_8bit"))
        dtype = {"bfloat16": 2, "float16": 2, "float32": 4}.get(str(get("dtype")), 4)
        trainable = None
        student = student_config(vars(self.options))
        if student.use_peft:
            config, targets = resources.config(get("model_name_or_path")), student.lora_target_modules
            trainable = adapter_parameters(config, int(student.lora_r or 0), targets, student.lora_modules_to_save)
        asks_former_self = self.item.script == "gkd" and not get("teacher_model_name_or_path")
        uses_reference = bool(get("use_kl_regularization") and not get("reference_logits")) or asks_former_self
        return TrainingShape(
            batch=int(get("per_device_train_batch_size")),
            length=int(get("max_length") or 1024),
            weight_bytes=_FOUR_BIT if four_bit else 1 if eight_bit else dtype,
            compute_bytes=2 if (get("bf16") is not False or get("fp16")) else 4,
            checkpointing=get("gradient_checkpointing") is not False,
            accumulates=int(get("gradient_accumulation_steps") or 1) > 1,
            trainable=trainable,
            optimizer=str(get("optim")),
            frozen_reference=uses_reference and trainable is None,
            teacher=self._live_teacher(resources, cuda),
        )

    def _live_teacher(self, resources: Resources, cuda: bool) -> LiveTeacher | None:
        """The teacher that is loaded beside the student; a server's is not."""
        name = self.get("teacher_model_name_or_path")
        if not name or self.get("teacher_server_url"):
            return None
        config = resources.config(name)
        stored = 4 if str(getattr(config, "dtype", None)) in ("torch.float32", "float32", "None") else 2
        quantised = {"4bit": _FOUR_BIT, "8bit": 1}.get(str(self.get("teacher_quantization")))
        return LiveTeacher(model_shape(config), quantised or (stored if cuda else 4))


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
        return self._load(self._configs, load_config, model)

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
        return self._load(self._tokenizers, load_tokenizer, model)

    def _load(self, cache: dict[str, Any], loader: Any, model: str) -> Any:
        if model not in cache:
            try:
                cache[model] = loader(model, trust_remote_code=self._trust)
            except ValueError as error:
                cache[model] = UnknownModelError(str(error))
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
    facts = StageFacts(item, SimpleNamespace(**values))
    facts.models  # noqa: B018  # raises for models that cannot be read
    return facts


Level = Literal["red", "yellow", "green"]
_STYLES = {"red": RED, "yellow": YELLOW, "green": GREEN}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `"red"` fails or trains on the wrong thing; `"yellow"` may surprise, or could not be looked at; `"green"` is well.
        stage: Name of the stage, or of the recipe.
        message: What was found and, unless it is well, what to do.
    """

    level: Level
    stage: str
    message: str

    def line(self, *, colour: bool) -> str:
        """One line for a terminal."""
        return f"{paint(f'{self.level:<6}', _STYLES[self.level], colour)} {self.stage}: {self.message}"
