"""Which model, with which engine: read from words and mappings, refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from trl_reasoning_distill.evaluation.models import ModelSpec
from trl_reasoning_distill.teacher.sampling import EngineArguments


@pytest.mark.parametrize(
    ("value", "model", "options", "told"),
    [
        ("m/a", "m/a", {}, "m/a"),
        ("openai:big", "big", {"engine": "openai"}, "openai:big"),
        ("C:/models/x", "C:/models/x", {}, "C:/models/x"),
        ({"model": "m", "quantization": "4bit"}, "m", {"quantization": "4bit"}, "m (quantization=4bit)"),
        ('{"model": "m", "adapter": "a"}', "m", {"adapter": "a"}, "m (adapter=a)"),
        ({"model": "m", "max_batch_size": 3}, "m", {"max_batch_size": 3}, "m"),  # it changes no answer
    ],
)
def test_a_model_is_a_path_or_a_mapping(value: Any, model: str, options: dict[str, Any], told: str) -> None:
    spec = ModelSpec.parse(value)
    assert (spec.model, dict(spec.options), spec.describe()) == (model, options, told)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"engine": "openai"}, "needs the key `model`"),
        ({"model": "m", "quantisation": "4bit"}, r"unknown options \['quantisation'\]"),
        ({"model": "m", "engine": "tgi"}, "engine='tgi'"),
        ('{"model": ', "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.parse(value)


def test_options_of_its_own_replace_the_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def make_engine(self: EngineArguments, model: str, kind: str | None = None) -> None:
        asked[model] = (self.quantization, self.max_batch_size, self.base_url, kind)

    monkeypatch.setattr(EngineArguments, "make_engine", make_engine)
    arguments = EngineArguments(max_batch_size=7)
    ModelSpec.parse({"model": "a", "quantization": "8bit"}).load(arguments)
    ModelSpec.parse({"model": "b", "engine": "openai", "base_url": "http://x/v1"}).load(arguments)
    assert asked == {"a": ("8bit", 7, None, None), "b": (None, 7, "http://x/v1", "openai")}
    with pytest.raises(ValueError, match="concurrency of the model 'c' means nothing to the 'transformers' engine"):
        ModelSpec.parse({"model": "c", "concurrency": 3}).load(arguments)
