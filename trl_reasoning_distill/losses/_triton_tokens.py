"""`_tokens.token_losses` and its gradient for CUDA: one program per token, in place of some 120 small kernels of autograd.

For cross-entropy and a Top-K teacher with a built-in divergence. The gradients of the divergences in the student's log-probabilities are
written by hand: forward KL q − p, reverse KL q · log q/p, JSD (1 − β) q · log q/m. Tested in Triton's interpreter against autograd.
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
from trl_reasoning_distill.losses._tokens import (
    DenseTerms,
    Entries,
    LossSettings,
    TokenGradients,
    TokenTargets,
    TokenValues,
)
from trl_reasoning_distill.losses.divergence import LOG_ZERO

if TYPE_CHECKING:
    from jaxtyping import Float

_NUMBER_OF = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_FLOATS = ("loss", "nll", "kd", "entropy", "teacher_mass", "student_mass")


def is_covered(targets: TokenTargets, padding: RowStatistics | None, settings: LossSettings, dense: DenseTerms) -> bool:
    """Whether the kernel knows these terms; all others go through `_tokens.token_losses` and autograd."""
    is_plain = targets.reference is None and padding is None and all(term is None for term in dense)
    return is_plain and (targets.teacher is None or settings.divergence in _NUMBER_OF)


@triton.jit
def _log_sum(values, extra, LOG_ZERO: tl.constexpr):
    """log(Σ exp(values) + exp(extra))."""
    top = tl.maximum(tl.maximum(tl.max(values, axis=0), extra), LOG_ZERO)
    return top + tl.log(tl.sum(tl.exp(values - top), axis=0) + tl.exp(extra - top))


@triton.jit
def _terms(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """The terms of a divergence on some events, and their gradient in log_q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == 0:
        return p * (log_p - log_q) + (q - p), q - p
    if DIVERGENCE == 1:
        slope = q * (log_q - log_p)
        return slope + (p - q), slope
    top = tl.maximum(log_p, log_q)
    log_m = top + tl.log(beta * tl.exp(log_p - top) + (1 - beta) * tl.exp(log_q - top))
    slope = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + slope, slope


@triton.jit
def _token_kernel(
    z_ptr,
    ids_ptr,
    unique_ptr,
    teacher_ptr,
    log_tail_ptr,
    max_ptr,
    first_tie_ptr,
    log_sum_exp_ptr,
    log_sum_exp_t_ptr,
    mean_ptr,
    sft_weight_ptr,
    kd_weight_ptr,
    floats_ptr,
    flags_ptr,
    grad_z_ptr,
    grad_ptr,
    grad_t_ptr,
    tokens,
    entries,
    inverse_temperature,
    factor,
    beta,
    HAS_TEACHER: tl.constexpr,
    HAS_LOG_TAIL: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_RENORMALIZED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOG_ZERO: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)  # torch.compile passes scalars in float64
    factor, beta = tl.cast(factor, tl.float32), tl.cast(beta, tl.float32)
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    mask = place < entries
    at = token * entries + place
    z = tl.load(z_ptr + at, mask=mask, other=-float("inf"))
    ids = tl.load(ids_ptr + at, mask=mask, other=0)
    rest, rest_max = tl.load(log_sum_exp_ptr + token), tl.load(max_ptr + token)
    sft_weight, kd_weight = tl.load(sft_weight_ptr + token), tl.load(kd_weight_ptr + token) * factor

    log_z = _log_sum(z, rest, LOG_ZERO)
    probs, rest_prob = tl.exp(z - log_z), tl.exp(rest - log_z)
    label = tl.sum(tl.where(place == 0, ids, 0), axis=0)
    nll = log_z - tl.sum(tl.where(place == 0, z, 0.0), axis=0)
    mean = tl.sum(probs * tl.maximum(z, LOG_ZERO), axis=0) + rest_prob * tl.load(mean_ptr + token)
    best = tl.max(z, axis=0)
    named = tl.min(tl.where(z >= best, ids, 1 << 62), axis=0)
    is_named = (best >= rest_max) & (named < tl.load(first_tie_ptr + token))
    top1 = tl.where(is_named, named, -1)
    grad_z = sft_weight * (probs - tl.where(place == 0, 1.0, 0.0))
    grad_rest = sft_weight * rest_prob

    kd, teacher_mass, student_mass = 0.0, 0.0, 0.0
    agrees = top1 < -1
    if HAS_TEACHER:
        teacher = tl.load(teacher_ptr + at, mask=mask, other=-float("inf"))
        log_q, log_q_rest = z - log_z, rest - log_z
        if HAS_TEMPERATURE:
            present = tl.load(unique_ptr + at, mask=mask, other=0) != 0
            scaled = tl.where(present, z * inverse_temperature, LOG_ZERO)
            rest_t = tl.where(rest_max > LOG_ZERO / 2, tl.load(log_sum_exp_t_ptr + token), LOG_ZERO)
            log_z_t = _log_sum(tl.where(mask, scaled, -float("inf")), rest_t, LOG_ZERO)
            log_q, log_q_rest = scaled - log_z_t, rest_t - log_z_t
        q, q_rest = tl.where(mask, tl.exp(log_q), 0.0), tl.exp(log_q_rest)
        kept = teacher > LOG_ZERO
        teacher_mass = tl.sum(tl.exp(teacher), axis=0)
        student_mass = tl.sum(tl.where(teacher > -float("inf"), q, 0.0), axis=0)
        first = tl.min(tl.where(teacher == tl.max(teacher, axis=0), place, BLOCK), axis=0)
        agrees = (top1 == tl.sum(tl.where(place == first, ids, 0), axis=0)) & (teacher_mass > 0)

        log_p = tl.where(kept, teacher, LOG_ZERO)
        student = tl.maximum(log_q, LOG_ZERO)
        moves = log_q >= LOG_ZERO  # what is below is held there, and has no gradient
        if IS_RENORMALIZED:
            on_support = tl.where(kept, student, -float("inf"))
            log_p = log_p - _log_sum(tl.where(kept, teacher, -float("inf")), -float("inf"), LOG_ZERO)
            value, slope = _terms(
                tl.maximum(log_p, LOG_ZERO),
                tl.maximum(student - _log_sum(on_support, -float("inf"), LOG_ZERO), LOG_ZERO),
                beta,
                DIVERGENCE,
            )
            value = tl.sum(tl.where(kept, value, 0.0), axis=0)
            grad_q, grad_q_rest = tl.where(kept & moves, slope, 0.0), 0.0
        else:
            outside = tl.where(kept | (place >= entries), -float("inf"), student)
            tail = _log_sum(outside, tl.maximum(log_q_rest, LOG_ZERO), LOG_ZERO)
            if HAS_LOG_TAIL:
                teacher_tail = tl.maximum(tl.load(log_tail_ptr + token), LOG_ZERO)
            else:
                total = _log_sum(tl.where(kept, teacher, -float("inf")), -float("inf"), LOG_ZERO)
                total = tl.minimum(total, -EPS)
                series = -total * (1 + total * (0.5 + total * (1.0 / 6)))  # of 1 - exp(total), which rounds near 0
                teacher_tail = tl.log(tl.where(total > -0.02, series, 1 - tl.exp(total)))
            teacher_tail = tl.where(tail < LOG_ZERO / 2, LOG_ZERO, teacher_tail)
            value, slope = _terms(log_p, student, beta, DIVERGENCE)
            tail_value, tail_slope = _terms(teacher_tail, tail, beta, DIVERGENCE)
            value = tl.sum(tl.where(kept, value, 0.0), axis=0) + tail_value
            shares = tl.exp(outside - tail)
            grad_q = tl.where(moves, tl.where(kept, slope, tail_slope * shares), 0.0)
            grad_q_rest = tl.where(log_q_rest >= LOG_ZERO, tail_slope * tl.exp(log_q_rest - tail), 0.0)
        has_target = tl.max(kept.to(tl.int32), axis=0) > 0
        kd = tl.where(has_target, tl.maximum(value, 0.0), 0.0) * factor
        weight = tl.where(has_target, kd_weight, 0.0)
        sum_of_grads = tl.sum(tl.where(mask, grad_q, 0.0), axis=0) + grad_q_rest
        to_z = weight * (grad_q - q * sum_of_grads)
        to_rest = weight * (grad_q_rest - q_rest * sum_of_grads)
        if HAS_TEMPERATURE:
            grad_z += tl.where(present, to_z * inverse_temperature, 0.0)
            tl.store(grad_t_ptr + token, tl.where(rest_max > LOG_ZERO / 2, to_rest, 0.0))
        else:
            grad_z += to_z
            grad_rest += to_rest

    tl.store(grad_z_ptr + at, grad_z, mask=mask)
    tl.store(grad_ptr + token, grad_rest)
    # In the order of `_FLOATS`; the KL to a reference is not among these terms.
    loss = sft_weight * nll + tl.load(kd_weight_ptr + token) * kd
    tl.store(floats_ptr + token, loss)
    tl.store(floats_ptr + tokens + token, nll)
    tl.store(floats_ptr + 2 * tokens + token, kd)
    tl.store(floats_ptr + 3 * tokens + token, log_z - mean)
    tl.store(floats_ptr + 4 * tokens + token, teacher_mass)
    tl.store(floats_ptr + 5 * tokens + token, student_mass)
    tl.store(flags_ptr + token, (top1 == label).to(tl.int8))
    tl.store(flags_ptr + tokens + token, agrees.to(tl.int8))


def token_losses(
    z: Float[Tensor, "tokens entries"],
    rest: RowStatistics,
    entries: Entries,
    targets: TokenTargets,
    settings: LossSettings,
) -> tuple[TokenValues, TokenGradients]:
    """See `_tokens.token_losses` and `_tokens.differentiated`."""
    tokens, width = z.shape
    teacher = targets.teacher
    has_temperature = teacher is not None and settings.temperature != 1.0
    divergence = settings.divergence if teacher is not None else "forward_kl"
    assert isinstance(divergence, str)
    if divergence == "jsd" and settings.beta in (0.0, 1.0):
        divergence = "reverse_kl" if settings.beta else "forward_kl"
    placed = z if teacher is None else entries.place(teacher, start=1).float()
    log_tail = None if teacher is None or teacher.log_tail is None else teacher.log_tail.float().contiguous()
    floats = z.new_empty(len(_FLOATS), tokens)
    flags = torch.empty(2, tokens, dtype=torch.int8, device=z.device)
    grad_z, grads = torch.empty_like(z), z.new_empty(2, tokens)
    _token_kernel[(tokens,)](
        z,
        entries.ids,
        entries.is_unique.to(torch.int8),
        placed,
        rest.max if log_tail is None else log_tail,
        rest.max,
        rest.first_tie,
        rest.log_sum_exp,
        rest.log_sum_exp_t,
        rest.mean,
        targets.sft_weight.contiguous(),
        targets.kd_weight.contiguous(),
        floats,
        flags,
        grad_z,
        grads[0],
        grads[1],
        tokens,
        width,
        1 / settings.temperature,
        settings.temperature**2 if settings.scale_by_t2 else 1.0,
        settings.beta,
        HAS_TEACHER=teacher is not None,
        HAS_LOG_TAIL=log_tail is not None,
        HAS_TEMPERATURE=has_temperature,
        IS_RENORMALIZED=settings.support == "renormalized",
        DIVERGENCE=_NUMBER_OF[divergence],
        LOG_ZERO=LOG_ZERO,
        EPS=torch.finfo(torch.float32).eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )
    found = dict(zip(_FLOATS, floats, strict=True))
    is_top1, agrees = flags.bool()
    values = TokenValues(kl=torch.zeros_like(floats[0]), is_top1=is_top1, top1_agreement=agrees, **found)
    return values, TokenGradients(grad_z, [grads[0]], grads[1] if has_temperature else None)
