"""`_tiles.dense_divergence_` for CUDA: one program per row, which reads two rows of logits two or three times and writes the gradient once.

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

from trl_reasoning_distill.losses.divergence import LOG_ZERO

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_BLOCK = 4096
_WARPS = 8
_NUMBER_OF = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@triton.jit
def _pair(student_ptr, other_ptr, offsets, vocab, log_q_sum, log_p_sum, inverse_temperature, LOG_ZERO: tl.constexpr):
    """A block of two rows: the student's logits, and both log-probabilities at the temperature."""
    mask = offsets < vocab
    z = tl.load(student_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    x = tl.load(other_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    log_q = tl.maximum(z * inverse_temperature - log_q_sum, LOG_ZERO)
    log_p = tl.maximum(x * inverse_temperature - log_p_sum, LOG_ZERO)
    return z, log_q, log_p


@triton.jit
def _log_mixture(log_q, log_p, beta):
    """log(βp + (1 − β)q), relative to the larger of the two."""
    top = tl.maximum(log_q, log_p)
    return top + tl.log(beta * tl.exp(log_p - top) + (1 - beta) * tl.exp(log_q - top))


@triton.jit
def _divergence_kernel(
    student_ptr,
    student_stride,
    other_ptr,
    other_stride,
    weight_ptr,
    value_ptr,
    agrees_ptr,
    vocab,
    inverse_temperature,
    beta,
    logit_scale,
    inverse_softcap,
    DIVERGENCE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LOG_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)  # torch.compile passes scalars in float64
    beta, logit_scale = tl.cast(beta, tl.float32), tl.cast(logit_scale, tl.float32)
    inverse_softcap = tl.cast(inverse_softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    other_ptr += row * other_stride

    top_z, top_x = LOG_ZERO, LOG_ZERO
    total_z, total_x = 0.0, 0.0
    first = 0
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z, scaled_z, scaled_x = _pair(student_ptr, other_ptr, offsets, vocab, 0.0, 0.0, inverse_temperature, LOG_ZERO)
        largest = tl.max(scaled_z, axis=0)
        place = tl.min(tl.where(scaled_z == largest, offsets, vocab), axis=0)
        first = tl.where(largest > top_z, place, first)  # of equals the lowest id
        new_z, new_x = tl.maximum(top_z, largest), tl.maximum(top_x, tl.max(scaled_x, axis=0))
        total_z = total_z * tl.exp(top_z - new_z) + tl.sum(tl.exp(scaled_z - new_z), axis=0)
        total_x = total_x * tl.exp(top_x - new_x) + tl.sum(tl.exp(scaled_x - new_x), axis=0)
        top_z, top_x = new_z, new_x
    log_q_sum, log_p_sum = top_z + tl.log(total_z), top_x + tl.log(total_x)
    chosen = tl.load(other_ptr + first).to(tl.float32) * inverse_temperature
    tl.store(agrees_ptr + row, (tl.maximum(chosen, LOG_ZERO) == top_x).to(tl.int8))

    factor = 0.0
    if HAS_GRADIENT:
        factor = tl.load(weight_ptr + row) * logit_scale * inverse_temperature
    # Of p against its partner, and of q: forward KL has the first alone, reverse KL the second, JSD both.
    of_p, of_q = 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        z, log_q, log_p = _pair(
            student_ptr, other_ptr, offsets, vocab, log_q_sum, log_p_sum, inverse_temperature, LOG_ZERO
        )
        q, p = tl.exp(log_q), tl.exp(log_p)
        if DIVERGENCE == 0:
            of_p += tl.sum(p * (log_p - log_q), axis=0)
            if HAS_GRADIENT:
                gradient = (q - p) * factor
                if HAS_SOFTCAP:
                    gradient = gradient * (1 - (z * inverse_softcap) * (z * inverse_softcap))
                tl.store(other_ptr + offsets, gradient.to(other_ptr.dtype.element_ty), mask=offsets < vocab)
        elif DIVERGENCE == 1:
            of_q += tl.sum(q * (log_q - log_p), axis=0)
        else:
            log_m = _log_mixture(log_q, log_p, beta)
            of_p += tl.sum(p * (log_p - log_m), axis=0)
            of_q += tl.sum(q * (log_q - log_m), axis=0)
    share = 1.0 - beta if DIVERGENCE == 2 else 1.0
    value = share * of_q + (beta * of_p if DIVERGENCE == 2 else of_p)
    tl.store(value_ptr + row, tl.maximum(value, 0.0))

    if HAS_GRADIENT and DIVERGENCE != 0:
        for start in range(0, vocab, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z, log_q, log_p = _pair(
                student_ptr, other_ptr, offsets, vocab, log_q_sum, log_p_sum, inverse_temperature, LOG_ZERO
            )
            partner = _log_mixture(log_q, log_p, beta) if DIVERGENCE == 2 else log_p
            gradient = tl.exp(log_q) * (log_q - partner - of_q) * (share * factor)
            if HAS_SOFTCAP:
                gradient = gradient * (1 - (z * inverse_softcap) * (z * inverse_softcap))
            tl.store(other_ptr + offsets, gradient.to(other_ptr.dtype.element_ty), mask=offsets < vocab)


def dense_divergence_(
    tile: Float[Tensor, "tokens vocab"],
    student: Float[Tensor, "tokens vocab"],
    weight: Float[Tensor, " tokens"] | None,
    divergence: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """See `_tiles.dense_divergence_`."""
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    tokens, vocab = tile.shape
    values = torch.empty(tokens, dtype=torch.float32, device=tile.device)
    agrees = torch.empty(tokens, dtype=torch.int8, device=tile.device)
    _divergence_kernel[(tokens,)](
        student,
        student.stride(0),
        tile,
        tile.stride(0),
        values if weight is None else weight.contiguous(),
        values,
        agrees,
        vocab,
        1 / temperature,
        beta,
        logit_scale,
        1 / (logit_softcap or 1.0),
        DIVERGENCE=_NUMBER_OF[divergence],
        HAS_GRADIENT=weight is not None,
        HAS_SOFTCAP=logit_softcap is not None,
        LOG_ZERO=LOG_ZERO,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return values, agrees.bool()
