"""A recipe's stages with their options made, and with their own plans as far as their inputs exist."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trl_reasoning_distill import hub
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import normalize_rows
from trl_reasoning_distill.data.published import Reading
from trl_reasoning_distill.data.row_files import read_rows
from trl_reasoning_distill.data.row_sets import rows_file
from trl_reasoning_distill.pipeline import RecipeStage, checked_command, unfinished_inputs
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.scripts import STAGES, source
from trl_reasoning_distill.scripts.evaluate import parse_models
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.scripts.stage import make_options

TRAININGS = ("sft", "distill", "gkd")
DEFAULT_KEY = "OPENAI_API_KEY"
SAMPLE_ROWS = 200

Level = Literal["red", "yellow", "green"]


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


class ExaminedStage:
    """A stage of a recipe with its options as the stage itself makes them.

    Args:
        item: The stage.
        run_folder: Where the recipe's results go.

    Attributes:
        waits_for: Earlier stages that have not made its inputs yet: then it has no plan of its own.

    Raises:
        ValueError: If an option is unknown or does not fit.
    """

    def __init__(self, item: RecipeStage, run_folder: Path) -> None:
        self.item, self.run_folder = item, run_folder
        self.module = importlib.import_module(f"trl_reasoning_distill.scripts.{item.script}")
        command = replace(checked_command(item), words=["--dry_run"])
        # What only a GPU can do is refused on a machine without one, unless a training was told to run on the CPU
        self.parts = make_options(self.module.make_parser(), command, {"use_cpu": True})
        self._options = {name: value for part in self.parts for name, value in vars(part).items()}
        self.waits_for = unfinished_inputs(item, run_folder)
        self.models, self.served  # noqa: B018  # raise for models that cannot be read

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.item.name

    @property
    def is_training(self) -> bool:
        """Whether it trains a student."""
        return self.item.script in TRAININGS

    def get(self, option: str) -> Any:
        """The value of an option; `None` if this stage has none of that name.

        Raises:
            KeyError: If no stage has an option of that name.
        """
        if option not in self._options and not any(option in options_of(stage) for stage in STAGES):
            raise KeyError(option)
        return self._options.get(option)

    def plan(self) -> Plan | None:
        """The stage's own plan; `None` if its inputs do not exist yet.

        Raises:
            ValueError: If the stage refuses its inputs.
        """
        if self.waits_for:
            return None
        stage_class = self.module.main.stage_class
        with contextlib.redirect_stdout(io.StringIO()):
            state = [launch_state()] if stage_class.is_parallel else []
            return stage_class(*self.parts, *state).plan()

    @cached_property
    def served(self) -> dict[str, ServedModel]:
        """The models that it asks of a server, by role."""
        if self.is_training:
            url, name = self.get("teacher_server_url"), self.get("teacher_model_name_or_path")
            return {"teacher": ServedModel(str(name), url, DEFAULT_KEY)} if url else {}
        found = {}
        for role, (model, own) in self._asked.items():
            engine, url, key = (own.get(name) or self.get(name) for name in ("engine", "base_url", "api_key_env"))
            if engine == "openai":
                found[role] = ServedModel(model, url or "$OPENAI_BASE_URL", key or DEFAULT_KEY)
        return found

    @cached_property
    def models(self) -> dict[str, str]:
        """The models that it loads, by role."""
        if self.is_training:
            teacher = None if self.served else self.get("teacher_model_name_or_path")
            return {"student": self.get("model_name_or_path")} | ({"teacher": teacher} if teacher else {})
        return {role: model for role, (model, _) in self._asked.items() if role not in self.served}

    @cached_property
    def _asked(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Models that are not trained, by role, each with engine options of its own."""
        if self.item.script == "evaluate":
            return {name: (spec.model, spec.options) for name, spec in parse_models(self.get("models")).items()}
        return {"teacher": (self.get("teacher"), {})} if self.item.script in ("generate", "capture") else {}

    @cached_property
    def sample(self) -> list[dict[str, Any]]:
        """The first rows that it trains on, if they are on this disk."""
        path = self.get("dataset_path")
        if not path or not rows_file(path).is_file():
            return []
        reading = Reading(
            ReasoningFormat.preset(self.get("reasoning_format")), self.get("data_shape"), needs_reply=False
        )
        try:
            return normalize_rows(read_rows(rows_file(path), SAMPLE_ROWS), reading).rows
        except ValueError:  # the stage itself refuses the file, and its plan has said why
            return []

    @property
    def prompts(self) -> list[str]:
        """The questions of these rows, as text."""
        prompts = (row.get("prompt") for row in self.sample)
        return [each if isinstance(each, str) else str(each[-1]["content"]) for each in prompts if each]


def options_of(stage: str) -> set[str]:
    """Names of all options of a stage."""
    return {option.name for option in source.read_options(source.script_path(stage))}


class Resources:
    """Configurations and tokenizers, loaded once each; a failed look-up is remembered, too."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str | None, ...], Any] = {}

    def config(self, model: str) -> Any:
        """A model's configuration; of an adapter, that of its base.

        Raises:
            UnknownModelError: If it cannot be had.
        """
        return self._load(hub.load_config, model)

    def tokenizer(self, model: str, chat_template: str | None = None) -> Any:
        """A model's tokenizer, with another chat template if one is given; see `hub.load_tokenizer`.

        Raises:
            UnknownModelError: If it cannot be had.
        """
        return self._load(hub.load_tokenizer, model, chat_template=chat_template)

    def has_config(self, model: str) -> bool:
        """Whether its configuration can be had."""
        with contextlib.suppress(UnknownModelError):
            return self.config(model) is not None
        return False

    def _load(self, load: Callable[..., Any], model: str, **options: str | None) -> Any:
        key = (load.__name__, model, *options.values())
        if key not in self._loaded:
            try:
                self._loaded[key] = load(model, **options)
            except ValueError as error:
                self._loaded[key] = UnknownModelError(str(error))
        if isinstance(self._loaded[key], UnknownModelError):
            raise self._loaded[key]
        return self._loaded[key]


def count_rows(stages: Sequence[ExaminedStage], plans: Mapping[str, Plan]) -> dict[str, int | None]:
    """How many rows reach each stage: by its own plan, else the most that the stages before it can make."""
    made: int | None = None
    counted: dict[str, int | None] = {}
    for stage in stages:
        plan = plans.get(stage.name)
        script, limit = stage.item.script, stage.get("limit")
        if script in ("evaluate", "report"):  # their problems are none of the other stages'
            counted[stage.name] = plan.rows if plan else limit
            continue
        if plan is not None and plan.rows is not None:
            counted[stage.name] = plan.rows
            made = plan.makes or plan.rows
            continue
        if script == "data":
            made = _mixture_size(stage)
        elif script == "generate" and not stage.waits_for:
            made = limit
        counted[stage.name] = min(made, limit) if made is not None and limit else made
    return counted


def _mixture_size(stage: ExaminedStage) -> int | None:
    """Problems that a mixture asks for; `None` where it leaves that to the sources."""
    entries = (stage.get("mixture") or {}).values()
    counts = [entry.get("count") if isinstance(entry, Mapping) else entry for entry in entries]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else stage.get("total")
