"""Continuous batching in transformers: a request that ends makes room at once for the next one.

Static batches wait for their longest row; with completions of very different length, as chains of thought are, most of the device then idles.
transformers' scheduler keeps a paged cache and fills the batch anew at every step. It draws from one random stream for all requests, so the
seeds are ours to keep: a logits processor of its own kind carries each request's number for its next token into the batch.

Read at transformers 5.23: the manager's list of processors, and `RequestState`'s counts of tokens, are not documented.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from trl_reasoning_distill.teacher.sampling.base import SamplingConfig
from trl_reasoning_distill.teacher.sampling.parameters import draw, make_warpers, uniforms

_BITS = 31  # of a random number that an int32 carries
_PAGE_SIZE = 256

Asked = tuple[list[int], int, int]


def is_worth_while(model: PreTrainedModel) -> bool:
    """Whether this model, where it is, reads a paged cache fast: FlashAttention on one CUDA device."""
    flash = is_flash_attn_3_available() or is_flash_attn_2_available()
    on_one_device = len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
    supported = bool(getattr(model, "_supports_flash_attn", False))
    return model.device.type == "cuda" and on_one_device and flash and supported


def generate_continuously(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    eos_token_ids: list[int],
    sampling: SamplingConfig,
    *,
    max_requests: int,
) -> Iterator[tuple[int, list[int], float | None]]:
    """Yield completions as they end, in any order.

    Args:
        model: In evaluation mode, on its device.
        asked: Prompt's ids, most new tokens, and seed of each request.
        eos_token_ids: A completion ends with one of these, which it keeps.
        sampling: How tokens are chosen.
        max_requests: Most requests in a batch on a device that is no GPU; on one, the memory decides.

    Yields:
        The request's place in `asked`, the ids it wrote, and their mean log-probability (`None` for sampled ones).

    Raises:
        RuntimeError: If transformers' generation thread fails, or a request does.
    """
    if not asked:
        return
    sampled = sampling.temperature > 0
    manager = model.init_continuous_batching(  # type: ignore[operator]
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=eos_token_ids
        ),
        continuous_batching_config=_config(model, asked, max_requests, sampled),
    )
    processor = _SeededRequests(sampling) if sampled else None
    try:
        if processor is not None:
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
            manager.logit_processor.tensors_required = 1
        manager.warmup()
        manager.start()
        places = {}
        for place, (ids, limit, seed) in enumerate(asked):
            options = {"seed": seed} if sampled else {}
            places[manager.add_request(ids, request_id=str(place), max_new_tokens=limit, **options)] = place
        while places:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError(
                        f"Continuous batching stopped with {len(places)} requests unanswered; the log above says why. "
                        "Use batching: static if this model or device cannot do it."
                    )
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {result.error}. Use batching: static.")
                mean = None if sampled else math.fsum(result.logprobs) / len(result.logprobs)
                place = places.pop(result.request_id)
                if processor is not None:
                    processor.forget(asked[place][2])
                yield place, list(result.generated_tokens), mean
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


class _SeededRequests(ContinuousBatchingLogitsProcessor):
    """`SeededSampler` for a batch whose rows come and go: the number of row r's next token travels with its request."""

    supported_kwargs = {"seed": int}  # noqa: RUF012 -- as the base class has it
    ignored_kwargs = ()

    def __init__(self, sampling: SamplingConfig) -> None:
        self.warpers = make_warpers(sampling)
        self.max_new_tokens = sampling.max_new_tokens
        self._streams: dict[int, np.ndarray] = {}

    def forget(self, seed: int) -> None:
        """Free the numbers of a request that has ended."""
        self._streams.pop(seed, None)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        numbers = [self._next_number(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        precision = torch.float32 if scores.device.type == "mps" else torch.float64
        uniform = (tensor_arg[: scores.shape[0], None].to(precision) + 0.5) / 2**_BITS
        return draw(scores, uniform, self.warpers)

    def _next_number(self, state: Any) -> int:
        seed = state.logit_processor_kwargs.get("seed", 0)
        if seed not in self._streams:
            self._streams[seed] = (uniforms(seed, self.max_new_tokens) * 2**_BITS).astype(np.int32)
        # A request that was evicted from the cache comes back with what it wrote as part of its prompt
        rewritten = len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0
        step = rewritten + len(state.generated_tokens)
        return int(self._streams[seed][min(step, self.max_new_tokens - 1)])


def _config(
    model: PreTrainedModel, asked: Sequence[Asked], max_requests: int, sampled: bool
) -> ContinuousBatchingConfig:
    """On a GPU transformers sizes the cache by the free memory; elsewhere it would take most of the machine's."""
    config = ContinuousBatchingConfig(
        page_size=_PAGE_SIZE,
        return_logprobs=not sampled,
        use_async_batching=False,  # a step is prepared only when the one before is known, as its number depends on it
    )
    if model.device.type != "cuda":
        longest = max(len(ids) + limit for ids, limit, _ in asked)
        running = min(max_requests, len(asked))
        config.num_blocks = running * math.ceil(longest / _PAGE_SIZE) + 1
        config.max_batch_tokens = max(len(ids) for ids, _, _ in asked) + running
        config.max_requests_per_batch = running
    return config
