"""One interface for everything that writes text: a model in this process, vLLM, or any OpenAI-compatible server.

An engine takes requests (a conversation and a seed each) and yields their outputs as they come, in any order. What a request
gives depends on the request alone, never on what else is asked with it, so a run may be killed, resumed and spread over any
number of ranks. The `transformers` engine keeps that promise up to floating-point ties; servers keep it as far as they
honour `seed`.

| kind | runs | wants |
|---|---|---|
| `transformers` | in this process, any hub model, folder, 4-bit, or adapter | nothing more |
| `vllm` | in this process, continuous batching, tensor parallel | `pip install 'trl-reasoning-distill[vllm]'` |
| `openai` | on a server: vLLM, llama.cpp, `transformers serve`, hosted | `pip install 'trl-reasoning-distill[server]'` |
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from trl_reasoning_distill.data.schema import FinishReason

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
ENGINES = ("transformers", "vllm", "openai")
_OPEN_TAG, _CLOSE_TAG = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: A completion is cut here, and its `finish_reason` is then `"length"`.
        temperature: 0 takes the most likely token (greedy).
        top_p: Keep the smallest set of tokens with this much probability; 1 keeps all.
        top_k: Keep this many tokens; 0 keeps all.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: a completion needs at least one token.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give 0 for greedy decoding, or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p}: give a share of the probability above 0 and at most 1 (1 keeps all tokens)."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give a number of tokens, or 0 to keep all.")


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One conversation to continue.

    Attributes:
        key: Names the request for its caller; engines only hand it back.
        messages: The conversation, `{"role": …, "content": …}` each, ending with the turn to answer.
        seed: What a sampled completion is drawn with; 0 ≤ seed < 2³¹, so that every server takes it.
    """

    key: str
    messages: list[dict[str, str]]
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """What an engine wrote for a request.

    Attributes:
        text: The completion without special tokens. When the prompt already opened a `<think>`, the tag is put back in
            front, so that the text can be read by itself.
        finish_reason: `"stop"` if the model ended by itself, else `"length"`.
        num_tokens: Length of the completion, the end token included; 0 if a server does not say.
        prompt_tokens: Length of the prompt; 0 if a server does not say.
        seconds: The request's latency on a server; its share of the batch's time in this process.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    prompt_tokens: int
    seconds: float


class Engine(Protocol):
    """Anything that continues conversations; `name` is the model's name or path."""

    name: str

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield every request once with its output, as outputs come, in any order."""
        ...


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
    # Imported here: each engine brings a heavy library, and only the one asked for should be paid for.
    if kind == "transformers":
        from trl_reasoning_distill.teacher.engine_transformers import TransformersEngine

        return TransformersEngine.from_pretrained
    if kind == "vllm":
        from trl_reasoning_distill.teacher.engine_vllm import VLLMEngine

        return VLLMEngine
    if kind == "openai":
        from trl_reasoning_distill.teacher.engine_openai import OpenAIEngine

        return OpenAIEngine
    raise ValueError(f"Unknown engine {kind!r}; there are {', '.join(ENGINES)}.")


def _option_names(factory: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(factory).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@dataclasses.dataclass
class EngineArguments:
    """Which engine, and its options, as flat keys for a YAML file or a command line.

    A key that the chosen engine does not have is refused unless it still holds its default.
    """

    engine: str = dataclasses.field(
        default="transformers",
        metadata={
            "help": "What generates: transformers (this process), vllm (this process), or openai (any compatible server)."
        },
    )
    model_revision: str | None = dataclasses.field(
        default=None, metadata={"help": "Branch, tag or commit of a hub model."}
    )
    dtype: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "float32, bfloat16, float16, or auto: the checkpoint's own on an accelerator, float32 on a CPU."
        },
    )
    device: str | None = dataclasses.field(
        default=None,
        metadata={"help": "[transformers] Device, such as cuda:0 or cpu. Default: what accelerate assigns."},
    )
    device_map: str | None = dataclasses.field(
        default=None,
        metadata={"help": "[transformers] auto spreads one model over all visible GPUs (then launch one process)."},
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "[transformers] sdpa, flash_attention_2, eager, … Default: the model's own."}
    )
    quantization: str | None = dataclasses.field(
        default=None,
        metadata={"help": "4bit (NF4) or 8bit through bitsandbytes; vllm also takes its own names, such as fp8."},
    )
    max_batch_size: int = dataclasses.field(default=128, metadata={"help": "[transformers] Most requests in a batch."})
    max_batch_tokens: int = dataclasses.field(
        default=65536,
        metadata={
            "help": "[transformers] Most tokens in a batch, prompts and completions together; lower it when memory runs out."
        },
    )
    tensor_parallel_size: int = dataclasses.field(default=1, metadata={"help": "[vllm] GPUs that share one model."})
    gpu_memory_utilization: float = dataclasses.field(
        default=0.9, metadata={"help": "[vllm] Share of each GPU's memory to use."}
    )
    max_model_len: int | None = dataclasses.field(
        default=None, metadata={"help": "[vllm] Context length; default: the model's."}
    )
    base_url: str | None = dataclasses.field(
        default=None,
        metadata={"help": "[openai] The server, such as http://localhost:8000/v1. Default: $OPENAI_BASE_URL."},
    )
    api_key_env: str = dataclasses.field(
        default="OPENAI_API_KEY",
        metadata={"help": "[openai] Environment variable that holds the key; the key itself is never stored."},
    )
    concurrency: int = dataclasses.field(default=32, metadata={"help": "[openai] Requests in flight at once."})
    request_timeout: float = dataclasses.field(
        default=600.0, metadata={"help": "[openai] Seconds before a request is given up and retried."}
    )
    max_retries: int = dataclasses.field(
        default=6,
        metadata={
            "help": "[openai] Retries per request, with exponential back-off, after 429, 5xx, or a lost connection."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": 'Variables for the chat template, such as {"enable_thinking": true}.'}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run code that comes with a hub model. Off unless you trust it."}
    )

    _renamed: ClassVar[dict[str, str]] = {"model_revision": "revision"}

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: choose one of {', '.join(ENGINES)}.")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = parse_mapping(self.chat_template_kwargs, "chat_template_kwargs")

    def make_engine(self, model: str, kind: str | None = None) -> Engine:
        """Load `model` with these options, in the engine `kind` instead of `self.engine` if given.

        Raises:
            ValueError: As `make_engine`, and for an option that was set but belongs to another engine.
        """
        kind = kind or self.engine
        allowed = _option_names(_factory(kind))
        options = {}
        for field in dataclasses.fields(EngineArguments):
            name, value = self._renamed.get(field.name, field.name), getattr(self, field.name)
            if name in allowed:
                options[name] = value
            elif value != field.default and field.name != "engine" and kind == self.engine:
                raise ValueError(
                    f"{field.name}={value!r} means nothing to the {kind!r} engine; remove it, or choose another engine."
                )
        return make_engine(kind, model, **options)


def sample_seed(problem_id: str, sample: int, seed: int = 0) -> int:
    """The seed of one sample: a hash of what identifies it, 0 ≤ seed < 2³¹, the same on any machine."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{problem_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def parse_mapping(text: str, name: str) -> dict[str, Any]:
    """A mapping given as JSON on a command line.

    Raises:
        ValueError: If it is not a JSON object; `name` says which option it was.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={text!r} is not JSON ({error}); write it like '{{\"key\": 1}}'.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r} is JSON, but not an object; write it like '{{\"key\": 1}}'.")
    return value


def launch_state() -> PartialState:
    """Rank, device and barriers of this launch.

    Ranks end their shares of a generation at very different times, so a barrier may wait for hours, where torch's default
    gives up after 10 minutes. This must be the process's first `PartialState` for the time-out to count.

    Raises:
        ValueError: If several processes were launched that do not know of each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    share_cpus()
    # `Accelerator` reads this variable, `PartialState` does not
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(days=7))
    check_launch(state)
    return state


def share_cpus() -> None:
    """Tell accelerate that the processes of this launch belong together, if they have no accelerator to tell by.

    `accelerate launch` does not hand `use_cpu: true` on to several processes, and without it each of them thinks that it is the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"


def check_launch(state: PartialState) -> None:
    """Refuse a launch that accelerate took for another than it is.

    Raises:
        ValueError: If several processes were launched that do not know of each other, or FSDP that has become DDP.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}: without an accelerator, "
            "set `use_cpu: true` in the accelerate config."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and state.device.type == "cpu":
        raise ValueError(
            "FSDP was asked for, but there is no accelerator, and on CPUs accelerate would run DDP instead without a word. "
            "Use accelerate_configs/zero2.yaml or zero3.yaml with `use_cpu: true`, or ddp.yaml."
        )


def restore_open_tag(text: str, *, opened: bool = False) -> str:
    """Put back the `<think>` that a chat template wrote into the prompt, so that a completion can be read by itself.

    Args:
        text: The completion.
        opened: Whether the prompt is known to end with the tag; a server does not tell, but a lone `</think>` does.
    """
    closes_first = _CLOSE_TAG in text and _OPEN_TAG not in text[: text.index(_CLOSE_TAG)]
    if (opened or closes_first) and not text.lstrip().startswith(_OPEN_TAG):
        return f"{_OPEN_TAG}\n{text.lstrip()}"
    return text


def is_opened(prompt: str) -> bool:
    """Whether a rendered prompt ends with an open `<think>`, as DeepSeek-R1's and QwQ's templates do."""
    return prompt.rstrip().endswith(_OPEN_TAG)


def in_chunks(items: Iterator[T], size: int = 128, seconds: float = 5.0) -> Iterator[list[T]]:
    """Group what an iterator yields, so that a slow one is written down at least every `seconds` and a fast one every `size`."""
    chunk: list[T] = []
    started = time.monotonic()
    for item in items:
        chunk.append(item)
        if len(chunk) >= size or time.monotonic() - started > seconds:
            yield chunk
            chunk, started = [], time.monotonic()
    if chunk:
        yield chunk
