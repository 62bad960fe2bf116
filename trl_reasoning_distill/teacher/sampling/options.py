"""Which engine, with which options: from a call, a YAML file, or a command line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from trl_reasoning_distill.options import (
    Count,
    CountOrZero,
    JsonMapping,
    OneOf,
    Options,
    Positive,
    PositiveShare,
    option,
)
from trl_reasoning_distill.teacher.sampling.base import Engine

ENGINES = {
    "transformers": "TransformersEngine.from_pretrained",
    "vllm": "VLLMEngine",
    "openai": "OpenAIEngine",
}
"""Every engine by name, which is also its module's in this package, and what makes one from a model's name and keyword options. The
module is imported when it is asked for: each brings a heavy library."""


def make_engine(kind: str, model: str, **options: Any) -> Engine:
    """Load an engine.

    Args:
        kind: One of `ENGINES`.
        model: A folder or hub name (of a model or of a PEFT adapter); for `openai`, the name the server knows it by.
        options: Keyword arguments of the engine: `TransformersEngine.from_pretrained`, `VLLMEngine` or `OpenAIEngine`.

    Raises:
        ValueError: For an unknown kind, an option the engine does not have, or a model that cannot be loaded.
        MissingExtraError: If the engine's library is not installed.
    """
    factory = _factory(kind)
    allowed = _option_names(factory)
    if unknown := sorted(set(options) - allowed):
        raise ValueError(
            f"The {kind!r} engine has no option {', '.join(map(repr, unknown))}; it has {sorted(allowed)}."
        )
    engine: Engine = factory(model, **options)
    return engine


def _factory(kind: str) -> Callable[..., Any]:
    if kind not in ENGINES:
        raise ValueError(f"Unknown engine {kind!r}; there are {', '.join(ENGINES)}.")
    module = importlib.import_module(f"{__package__}.{kind}")
    factory: Callable[..., Any] = operator.attrgetter(ENGINES[kind])(module)
    return factory


def _option_names(factory: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(factory).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@dataclasses.dataclass
class LoadingOptions(Options):
    """How a model is loaded in this process."""

    model_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    dtype: str = option(
        "auto", "float32, bfloat16, float16, or auto: the checkpoint's own on an accelerator, float32 on a CPU."
    )
    device_map: str | None = option(
        None, "[transformers] auto spreads one model over all visible GPUs and the memory (then launch one process)."
    )
    attn_implementation: str | None = option(
        None, "[transformers] sdpa, flash_attention_2, eager, … Default: the model's own."
    )
    quantization: str | None = option(
        None, "4bit (NF4) or 8bit through bitsandbytes; vllm also takes its own names, such as fp8."
    )
    trust_remote_code: bool = option(False, "Run code that comes with a hub model. Off unless you trust it.")


@dataclasses.dataclass
class ServerOptions(Options):
    """How a model on a server is asked."""

    base_url: str | None = option(
        None, "[openai] The server, such as http://localhost:8000/v1. Default: $OPENAI_BASE_URL."
    )
    api_key_env: str = option(
        "OPENAI_API_KEY", "[openai] Environment variable that holds the key; the key itself is never stored."
    )
    concurrency: Count = option(32, "[openai] Requests in flight at once.")
    request_timeout: Positive = option(600.0, "[openai] Seconds before a request is given up and retried.")
    max_retries: CountOrZero = option(
        6, "[openai] Retries per request, with exponential back-off, after 429, 5xx, or a lost connection."
    )


@dataclasses.dataclass
class EngineArguments(ServerOptions, LoadingOptions):
    """Which engine, and its options, as flat keys for a YAML file or a command line.

    A key that the chosen engine does not have is refused unless it still holds its default.
    """

    engine: Annotated[str, OneOf(ENGINES)] = option(
        "transformers", "What generates: transformers (this process), vllm (this process), or openai (a server)."
    )
    adapter: str | None = option(
        None,
        "[transformers] PEFT adapter, a folder or hub name, to put on the model. A model that is an adapter brings its own base.",
    )
    device: str | None = option(None, "[transformers] Device, such as cuda:0 or cpu. Default: what accelerate assigns.")
    max_batch_size: Count = option(128, "[transformers] Most requests in a batch.")
    max_batch_tokens: Count = option(
        65536, "[transformers] Most tokens in a batch, prompts and completions together; lower it when memory runs out."
    )
    tensor_parallel_size: Count = option(1, "[vllm] GPUs that share one model.")
    gpu_memory_utilization: PositiveShare = option(0.9, "[vllm] Share of each GPU's memory to use.")
    max_model_len: Count | None = option(None, "[vllm] Context length; default: the model's.")
    leave_out: list[str] = option(
        [], "[openai] What is not sent, for a server that refuses it: max_tokens, temperature, top_p, seed."
    )
    chat_template_kwargs: JsonMapping | None = option(
        None, 'Variables for the chat template, such as {"enable_thinking": true}.'
    )

    _renamed: ClassVar[dict[str, str]] = {"model_revision": "revision"}

    @staticmethod
    def option_names(kind: str) -> set[str]:
        """The fields that the engine `kind` has a use for.

        Raises:
            ValueError: For an unknown kind.
        """
        allowed = _option_names(_factory(kind))
        renamed = EngineArguments._renamed
        return {f.name for f in dataclasses.fields(EngineArguments) if renamed.get(f.name, f.name) in allowed}

    def make_engine(self, model: str, kind: str | None = None) -> Engine:
        """Load `model` with these options, in the engine `kind` instead of `self.engine` if given.

        Raises:
            ValueError: As `make_engine`, and for an option that was set but belongs to another engine.
        """
        kind = kind or self.engine
        allowed = _option_names(_factory(kind))
        options = {}
        untouched = EngineArguments()
        for field in (each.name for each in dataclasses.fields(EngineArguments)):
            name, value = self._renamed.get(field, field), getattr(self, field)
            if name in allowed:
                options[name] = value
            elif value != getattr(untouched, field) and field != "engine" and kind == self.engine:
                raise ValueError(
                    f"{field}={value!r} means nothing to the {kind!r} engine; remove it, or choose another engine."
                )
        return make_engine(kind, model, **options)
