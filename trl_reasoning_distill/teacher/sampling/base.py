"""What an engine takes and gives."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from trl_reasoning_distill.data.formatting import PRESETS
from trl_reasoning_distill.data.schema import FinishReason

T = TypeVar("T")
THINK = PRESETS["think"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: A completion is cut here, and its `finish_reason` is then `"length"`.
        temperature: 0 takes the most likely token (greedy).
        top_p: Keep the smallest set of tokens with this much probability; 1 keeps all.
        top_k: Keep this many tokens; 0 keeps all.
        stop: A completion ends before the first of these strings; `None`: where the model begins a question of its own (see
            `stopping.py`); none at all: nowhere.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] | None = None

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
        if self.stop is not None and not all(self.stop):
            raise ValueError(f"stop={list(self.stop)}: an empty text would end every completion at its beginning.")


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
        finish_reason: `"stop"` if the model ended by itself, `"length"` if it was cut, `"error"` if a server gave no answer.
        num_tokens: Length of what the model wrote, the end token included; 0 if a server does not report it.
        prompt_tokens: Length of the prompt; 0 if a server does not report it.
        seconds: The request's latency on a server; its share of the batch's time in this process.
        mean_log_prob: Mean log-probability of the completion's tokens under the model at temperature 1, in nats; `None` from an
            engine that does not report it.
        error: Why a server gave no answer; `None` if there is one.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    prompt_tokens: int
    seconds: float
    mean_log_prob: float | None = None
    error: str | None = None


class Engine(Protocol):
    """Anything that continues conversations; `name` is the model's name or path."""

    name: str

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield every request once with its output, as outputs come, in any order.

        A request that failed is yielded too, with its `error`.

        Raises:
            ValueError: After the last output, if not one request was answered; before, if no further one can be.
        """
        ...


def sample_seed(problem_id: str, sample: int, seed: int = 0) -> int:
    """The seed of one sample: a hash of what identifies it, 0 ≤ seed < 2³¹, the same on any machine."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{problem_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def restore_open_tag(text: str, *, opened: bool = False) -> str:
    """Put back the `<think>` that a chat template wrote into the prompt, so that a completion can be read by itself.

    Args:
        text: The completion.
        opened: Whether the prompt is known to end with the tag; a server does not report it, but a lone `</think>` shows it.
    """
    closes_first = THINK.close_tag in text and THINK.open_tag not in text[: text.index(THINK.close_tag)]
    if (opened or closes_first) and not text.lstrip().startswith(THINK.open_tag):
        return f"{THINK.open_tag}\n{text.lstrip()}"
    return text


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
