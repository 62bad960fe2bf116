"""`_rows` for CUDA: one program per row, so that each logit is read once for the statistics and once for the gradient.

Tested in Triton's interpreter on the CPU, and by the whole test suite of the losses with `-m gpu` where a GPU is at hand.
"""

# Triton reads the annotations of its kernels itself, and writes its constants in capitals.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_reasoning_distill.losses._rows import RowStatistics
from trl_reasoning_distill.losses.divergence import LOG_ZERO

if TYPE_CHECKING:
    from jaxtyping import Float

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _statistics_kernel(
    logits_ptr,
    stride,
    rival_ptr,
    max_ptr,
    first_tie_ptr,
    log_sum_exp_ptr,
    log_sum_exp_t_ptr,
    mean_ptr,
    vocab,
    inverse_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    IS_TWO: tl.constexpr,
    LOG_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)  # torch.compile passes scalars in float64
    row = tl.program_id(0).to(tl.int64)
    rival = tl.load(rival_ptr + row)
    top = LOG_ZERO  # not -inf: a block of which nothing is left would make inf - inf
    total, total_t, weighted = 0.0, 0.0, 0.0
    first_tie = vocab
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < vocab
        z = tl.load(logits_ptr + row * stride + offsets, mask=mask, other=-float("inf")).to(tl.float32)
        first_tie = tl.minimum(first_tie, tl.min(tl.where(z == rival, offsets, vocab), axis=0))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        if HAS_TEMPERATURE:
            e_t = tl.exp((z - new_top) * inverse_temperature)
            total_t = total_t * tl.exp((top - new_top) * inverse_temperature) + tl.sum(e_t, axis=0)
            # One exponential serves both: e^z = (e^(z/2))²
            e = e_t * e_t if IS_TWO else tl.exp(z - new_top)
        else:
            e = tl.exp(z - new_top)
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(e, axis=0)
        weighted = weighted * rescale + tl.sum(e * tl.maximum(z, LOG_ZERO), axis=0)
        top = new_top
    tl.store(max_ptr + row, top)
    tl.store(first_tie_ptr + row, tl.where(top == rival, first_tie, vocab).to(tl.int64))
    tl.store(log_sum_exp_ptr + row, tl.maximum(tl.log(total) + top, LOG_ZERO))
    tl.store(mean_ptr + row, tl.where(total == 0.0, LOG_ZERO, weighted / total))
    if HAS_TEMPERATURE:
        tl.store(
            log_sum_exp_t_ptr + row,
            tl.maximum(tl.log(total_t) + top * inverse_temperature, LOG_ZERO * inverse_temperature),
        )


@triton.jit
def _gradient_kernel(
    logits_ptr,
    stride,
    log_sum_exp_ptr,
    log_sum_exp_t_ptr,
    weight_ptr,
    weight_t_ptr,
    vocab,
    inverse_temperature,
    logit_scale,
    inverse_softcap,
    HAS_TEMPERATURE: tl.constexpr,
    IS_TWO: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    logit_scale = tl.cast(logit_scale, tl.float32)
    inverse_softcap = tl.cast(inverse_softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < vocab
    pointers = logits_ptr + row * stride + offsets
    z = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    log_sum_exp = tl.load(log_sum_exp_ptr + row)
    weight = tl.load(weight_ptr + row)
    if HAS_TEMPERATURE:
        log_sum_exp_t = tl.load(log_sum_exp_t_ptr + row)
        weight_t = tl.load(weight_t_ptr + row)
        if IS_TWO:
            root = tl.exp((z - log_sum_exp) * 0.5)
            gradient = root * (weight * root + weight_t * tl.exp(log_sum_exp * 0.5 - log_sum_exp_t))
        else:
            gradient = weight * tl.exp(z - log_sum_exp) + weight_t * tl.exp(z * inverse_temperature - log_sum_exp_t)
    else:
        gradient = weight * tl.exp(z - log_sum_exp)
    if HAS_SOFTCAP:
        share = z * inverse_softcap
        gradient = gradient * (1 - share * share)
    tl.store(pointers, (gradient * logit_scale).to(logits_ptr.dtype.element_ty), mask=mask)


def row_statistics(
    logits: Float[Tensor, "tokens vocab"], temperature: float, rival: Float[Tensor, " tokens"]
) -> RowStatistics:
    """See `_rows.row_statistics`."""
    tokens, vocab = logits.shape
    maximum, log_sum_exp, log_sum_exp_t, mean = logits.new_empty(4, tokens, dtype=torch.float32)
    first_tie = torch.empty(tokens, dtype=torch.long, device=logits.device)
    _statistics_kernel[(tokens,)](
        logits,
        logits.stride(0),
        rival,
        maximum,
        first_tie,
        log_sum_exp,
        log_sum_exp_t,
        mean,
        vocab,
        1 / temperature,
        HAS_TEMPERATURE=temperature != 1.0,
        IS_TWO=temperature == 2.0,
        LOG_ZERO=LOG_ZERO,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return RowStatistics(maximum, first_tie, log_sum_exp, log_sum_exp if temperature == 1.0 else log_sum_exp_t, mean)


def row_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    statistics: RowStatistics,
    weight: Float[Tensor, " tokens"],
    weight_t: Float[Tensor, " tokens"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> None:
    """See `_rows.row_gradient_`."""
    tokens, vocab = logits.shape
    _gradient_kernel[(tokens, triton.cdiv(vocab, _BLOCK))](
        logits,
        logits.stride(0),
        statistics.log_sum_exp,
        statistics.log_sum_exp_t,
        weight.contiguous(),
        (weight if weight_t is None else weight_t).contiguous(),
        vocab,
        1 / temperature,
        logit_scale,
        1 / (logit_softcap or 1.0),
        HAS_TEMPERATURE=weight_t is not None,
        IS_TWO=temperature == 2.0,
        HAS_SOFTCAP=logit_softcap is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
