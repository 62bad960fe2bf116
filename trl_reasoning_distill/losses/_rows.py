"""What the loss does to whole rows of logits, in torch: the reference for `_triton_rows`, and the path for the CPU.

Both functions walk over the tile in blocks of a few rows that stay in the cache, as a GPU kernel would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trl_reasoning_distill.losses.divergence import accumulator

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Elements of a block of rows: 1 MiB of float32 for a core's cache; on an accelerator the fewer launches the better.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**18, 2**26


class RowStatistics(NamedTuple):
    """One number per row of logits; floats in float32 (float64 for float64 logits)."""

    max: Float[Tensor, " tokens"]
    argmax: Int[Tensor, " tokens"]
    log_sum_exp: Float[Tensor, " tokens"]
    log_sum_exp_t: Float[Tensor, " tokens"]
    """The same for logits divided by the temperature."""
    mean: Float[Tensor, " tokens"]
    """The expected logit under the softmax of the row."""


def row_statistics(logits: Float[Tensor, "tokens vocab"], temperature: float) -> RowStatistics:
    """Reduce each row of logits; argmax is the first of equals."""
    dtype = accumulator(logits.dtype)
    maximum, log_sum_exp, log_sum_exp_t, mean = logits.new_empty(4, len(logits), dtype=dtype)
    argmax = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for rows, (x, e) in blocks(logits, dtype, scratch=2):
        torch.max(x, dim=-1, out=(maximum[rows], argmax[rows]))
        top = maximum[rows]
        x.sub_(top[:, None])
        if temperature == 1.0:
            torch.exp(x, out=e)
        else:
            torch.mul(x, 1 / temperature, out=e).exp_()
            log_sum_exp_t[rows] = e.sum(-1).log_() + top / temperature
            if temperature == 2.0:  # one exponential serves both: e^z = (e^(z/2))²
                e.mul_(e)
            else:
                torch.exp(x, out=e)
        total = e.sum(-1)
        log_sum_exp[rows] = total.log() + top
        mean[rows] = torch.linalg.vecdot(e, x) / total + top
    return RowStatistics(maximum, argmax, log_sum_exp, log_sum_exp if temperature == 1.0 else log_sum_exp_t, mean)


def row_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    statistics: RowStatistics,
    weight: Float[Tensor, " tokens"],
    weight_t: Float[Tensor, " tokens"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> None:
    """Overwrite each row with `weight * softmax(row) + weight_t * softmax(row / T)`, times d(logit)/d(projection).

    Args:
        logits: `(tokens, vocab)`, after scale and soft-cap.
        statistics: of these rows.
        weight: `(tokens,)`.
        weight_t: `(tokens,)`, or None for no second term; at temperature 1 there is none.
        temperature: T.
        logit_scale: the factor that was applied to the projection.
        logit_softcap: the soft-cap that was applied after it.
    """
    dtype = statistics.max.dtype
    weight = weight[:, None] * logit_scale
    weight_t = None if weight_t is None else weight_t[:, None] * logit_scale
    log_sum_exp, log_sum_exp_t = statistics.log_sum_exp[:, None], statistics.log_sum_exp_t[:, None]
    for rows, (x, e) in blocks(logits, dtype, scratch=2):
        if weight_t is None:
            torch.sub(x, log_sum_exp[rows], out=e).exp_().mul_(weight[rows])
        elif temperature == 2.0:
            torch.sub(x, log_sum_exp[rows], out=e).mul_(0.5).exp_()
            ratio = torch.exp(log_sum_exp[rows] / 2 - log_sum_exp_t[rows])
            e.mul_(e * weight[rows] + ratio * weight_t[rows])
        else:
            torch.sub(x, log_sum_exp[rows], out=e).exp_().mul_(weight[rows])
            e.add_((x / temperature).sub_(log_sum_exp_t[rows]).exp_().mul_(weight_t[rows]))
        if logit_softcap is not None:  # z = cap * tanh(y / cap), so dz/dy = 1 - (z / cap)²
            e.mul_(x.div_(logit_softcap).square_().neg_().add_(1))
        logits[rows] = e


def blocks(
    logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype, scratch: int
) -> Iterator[tuple[slice, list[Float[Tensor, "rows vocab"]]]]:
    """Slices of a few rows with buffers of their size, reused; the first holds a copy of the rows."""
    tokens, vocab = logits.shape
    block = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _ACCELERATOR_BLOCK) // vocab)
    buffers = logits.new_empty(scratch, min(block, tokens), vocab, dtype=dtype)
    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        views = [buffer[: rows.stop - start] for buffer in buffers]
        views[0].copy_(logits[rows])
        yield rows, views
