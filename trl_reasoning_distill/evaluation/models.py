"""Which model to evaluate, and with which engine and options of its own.

A model is a folder or hub name (of a model or a PEFT adapter). Prefixed with an engine, as in `openai:Qwen2.5-7B-Instruct`, it is
asked through that engine instead of the evaluation's own. A mapping holds more:

    teacher: {model: Qwen2.5-7B-Instruct, engine: openai, base_url: http://localhost:8000/v1}
    quantised: {model: runs/x/distill/final_model, quantization: 4bit}
    adapted: {model: Qwen/Qwen2.5-0.5B, adapter: runs/x/sft/final_model}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trl_reasoning_distill.options import parse_mapping
from trl_reasoning_distill.teacher.sampling import ENGINES, Engine, EngineArguments

_CHANGES_ANSWERS = ("adapter", "model_revision", "dtype", "quantization", "base_url", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model to evaluate.

    Attributes:
        model: Folder or hub name; on a server, the name it knows.
        options: Fields of `EngineArguments` that differ from the evaluation's own.
    """

    model: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, value: str | Mapping[str, Any]) -> ModelSpec:
        """Read `path`, `engine:name`, `{"model": …, option: …}`, or the latter as JSON.

        Raises:
            ValueError: If `model` is missing, or an option is unknown or out of its range.
        """
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = parse_mapping(value, "model")
        if isinstance(value, str):
            kind, colon, name = value.partition(":")
            return cls(name, {"engine": kind}) if colon and kind in ENGINES else cls(value)
        options = dict(value)
        model = options.pop("model", None)
        if not isinstance(model, str) or not model:
            raise ValueError(f"A model given as a mapping needs the key `model`, found {json.dumps(dict(value))}.")
        known = {field.name for field in dataclasses.fields(EngineArguments)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"The model {model!r} has unknown options {unknown}; there are {sorted(known)}.")
        EngineArguments(**options)
        return cls(model, options)

    def describe(self) -> str:
        """The model with what of its options can change an answer; the `model_path` of a prediction."""
        changes = [f"{name}={self.options[name]}" for name in _CHANGES_ANSWERS if self.options.get(name) is not None]
        model = f"{self.options['engine']}:{self.model}" if "engine" in self.options else self.model
        return f"{model} ({', '.join(changes)})" if changes else model

    @property
    def trusts_remote_code(self) -> bool:
        """Whether its own options let its code run."""
        return bool(self.options.get("trust_remote_code"))

    def arguments(self, arguments: EngineArguments) -> EngineArguments:
        """The engine's options, with the model's own in place of those of `arguments`."""
        return dataclasses.replace(arguments, **self.options)

    def load(self, arguments: EngineArguments) -> Engine:
        """Load the model, with its own options in place of those of `arguments`.

        Raises:
            ValueError: If it cannot be loaded, or an option of its own means nothing to its engine.
        """
        kind = str(self.options.get("engine", arguments.engine))
        own = {name: value for name, value in self.options.items() if name != "engine"}
        if useless := sorted(set(own) - EngineArguments.option_names(kind)):
            raise ValueError(f"{', '.join(useless)} of the model {self.model!r} means nothing to the {kind!r} engine.")
        return dataclasses.replace(arguments, **own).make_engine(self.model, self.options.get("engine"))
