"""How the `transformers` engine chooses tokens: each request from a stream of random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_reasoning_distill.teacher.sampling.base import SamplingConfig


def uniforms(seed: int, count: int) -> np.ndarray:
    """`(count,)` numbers in [0, 1), one per token; NumPy's Philox stream is fixed across versions and devices."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def make_warpers(sampling: SamplingConfig) -> LogitsProcessorList:
    """Temperature, top_k and top_p, applied in this order, as vLLM and transformers do."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def draw(scores: torch.Tensor, uniform: torch.Tensor, warpers: LogitsProcessorList) -> torch.Tensor:
    """Draw a token per row, and leave only that token possible.

    Args:
        scores: `(rows, vocabulary)` logits.
        uniform: `(rows, 1)` in [0, 1): where in the cumulative distribution each row's token lies.
        warpers: From `make_warpers`.

    Returns:
        `(rows, vocabulary)`: 0 for the token drawn, −∞ for all others.
    """
    probabilities = warpers(None, scores.float()).softmax(-1)  # type: ignore[arg-type]
    # Double precision, so that rounding in the sum can move a boundary by 1e-16 only (MPS has no doubles).
    precision = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = probabilities.cumsum(-1, dtype=precision)
    # `right=True` never lands on a token of probability zero: its cumulative value equals the one before it.
    drawn = torch.searchsorted(cumulative, uniform.to(scores.device, precision) * cumulative[:, -1:], right=True)
    return torch.full_like(scores, float("-inf")).scatter_(1, drawn.clamp_(max=scores.shape[-1] - 1), 0.0)


class SeededSampler(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers and leaves only that token possible.

    Row r uses the stream of its seed and nothing else: one uniform number per step, looked up in the cumulative distribution.
    Hence neither the other rows of the batch nor their number, order or padding can change a draw, and the cost does not grow
    with the vocabulary as it would with noise per token.

    Args:
        seeds: One per row.
        sampling: Temperature, top_k and top_p, applied in this order, as vLLM and transformers do.
        prompt_width: Columns of the padded prompts; the step is counted from there.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingConfig, prompt_width: int) -> None:
        self.uniforms = torch.from_numpy(np.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds]))
        self.prompt_width = prompt_width
        self.warpers = make_warpers(sampling)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return draw(scores, self.uniforms[:, input_ids.shape[1] - self.prompt_width, None], self.warpers)


class ChosenTokens(LogitsProcessor):
    """Chooses each next token, greedily or with a `SeededSampler`, and keeps its log-probability under the model as it is.

    Attributes:
        log_probs: `(rows,)` per step, at temperature 1 and before any truncation of the distribution.
    """

    def __init__(self, sampler: SeededSampler | None) -> None:
        self.sampler = sampler
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores if self.sampler is None else self.sampler(input_ids, scores)
        logits = scores.float()
        token = chosen.argmax(-1, keepdim=True)
        self.log_probs.append(logits.gather(-1, token).squeeze(-1) - logits.logsumexp(-1))
        return chosen
