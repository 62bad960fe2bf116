"""The sparse divergences: teacher against student on the teacher's Top-K tokens and one bucket for all others.

This module is the definition. Everything is differentiable in the student, works on `(tokens, k)` tensors and never
sees the vocabulary; `fused.py` feeds it from hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Support = Literal["tail", "renormalized"]
DivergenceFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A divergence of one's own: `f(student_log_probs, teacher_log_probs, student_log_tail) -> (tokens,)`, differentiable in the
student's; shapes `(tokens, k)`, `(tokens, k)`, `(tokens,)`, with -inf for the teacher at entries outside the support."""

# Stands for log 0. Unlike -inf it keeps `0 * log 0`, `log 0 - log 0` and the gradients of logsumexp finite, and its
# exponential is exactly 0 in every dtype. It fits in float16.
LOG_ZERO = -1e4


@dataclass(frozen=True)
class TopKTargets:
    """What the teacher says about each token: its most likely next tokens and their log-probabilities.

    Attributes:
        ids: `(tokens, k)`, token ids in the student's vocabulary, most likely first and distinct within a row; -1 where
            there is none. A row of -1 is a token without a target.
        log_probs: `(tokens, k)`, their log-probabilities in nats over the *whole* vocabulary, at the temperature of the
            loss. What they leave of the mass, `1 - sum(exp(log_probs))`, is the tail. Ignored where the id is -1.
        log_tail: `(tokens,)`, the logarithm of that tail, from whom knows it better than the difference does.

    Raises:
        ValueError: if the two are not matrices of one shape, of integers and of floats.
    """

    ids: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens k"]
    log_tail: Float[Tensor, " tokens"] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.log_probs.shape:
            raise ValueError(
                f"Top-K targets need `ids` and `log_probs` of one shape (tokens, k), but got {tuple(self.ids.shape)} "
                f"and {tuple(self.log_probs.shape)}."
            )
        if self.ids.is_floating_point() or not self.log_probs.is_floating_point():
            raise ValueError(
                f"Top-K targets need integer `ids` and floating-point `log_probs`, but got {self.ids.dtype} and "
                f"{self.log_probs.dtype}."
            )

    def __getitem__(self, tokens: slice | Int[Tensor, " n"]) -> TopKTargets:
        """The targets of some tokens only."""
        return TopKTargets(
            self.ids[tokens], self.log_probs[tokens], None if self.log_tail is None else self.log_tail[tokens]
        )

    def truncated(self, top_p: float) -> TopKTargets:
        """Log-probabilities in float32 (or 64), ids without mass or beyond `top_p` marked as missing; see `truncate_to_top_p`."""
        given = self.log_probs.to(accumulator(self.log_probs.dtype)).masked_fill(self.ids < 0, -torch.inf)
        kept = truncate_to_top_p(given, top_p)
        tail = self.log_tail
        if tail is not None and top_p < 1.0:
            tail = torch.cat([tail[:, None], given.masked_fill(kept > -torch.inf, -torch.inf)], -1).logsumexp(-1)
        return TopKTargets(self.ids.masked_fill(kept == -torch.inf, -1), kept, tail)


def truncate_to_top_p(log_probs: Float[Tensor, "tokens k"], top_p: float) -> Float[Tensor, "tokens k"]:
    """Adaptive K: keep, per token, the fewest of the most likely tokens whose mass reaches `top_p`; the others get -inf.

    Their mass falls into the tail. Tokens are expected most likely first; at least one is kept.
    """
    if top_p >= 1.0:
        return log_probs
    probs = log_probs.to(accumulator(log_probs.dtype)).exp()
    mass_before = probs.cumsum(-1) - probs
    return log_probs.masked_fill(mass_before >= top_p, -math.inf)


def topk_divergence(
    student_log_probs: Float[Tensor, "tokens k"],
    teacher_log_probs: Float[Tensor, "tokens k"],
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    support: Support = "tail",
    top_p: float = 1.0,
    student_log_tail: Float[Tensor, " tokens"] | None = None,
    teacher_log_tail: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " tokens"]:
    """Divergence between teacher and student on the teacher's Top-K tokens, with or without a bucket for all others.

    With `support="tail"` the K tokens and the rest of the vocabulary are K + 1 events, on which both distributions are
    proper: the divergence is ≥ 0, 0 when they agree, at most the divergence over the whole vocabulary, and equal to it
    at K = V. With `"renormalized"` both are conditioned on the K tokens; what the student does elsewhere is free, so
    reverse KL and JSD, which could then drive mass off the support, are refused.

    `"jsd"` follows TRL's GKD: `beta * KL(teacher ‖ m) + (1 - beta) * KL(student ‖ m)` with
    `m = beta * teacher + (1 - beta) * student`; exactly 0 and 1 mean forward and reverse KL. In between it vanishes
    towards both ends: it is about `beta * KL(teacher ‖ student)` for small `beta` and
    `(1 - beta) * KL(student ‖ teacher)` near 1, so a value near an end needs a larger weight.

    Args:
        student_log_probs: `(tokens, k)`, student log-probabilities over the whole vocabulary, at the temperature of the
            loss, of the same ids as the teacher's. -inf where there is no id.
        teacher_log_probs: `(tokens, k)`, most likely first. -inf where the id carries no mass: it is then part of the
            tail. A row without any mass has divergence 0.
        divergence: a name in `DIVERGENCES`: `"forward_kl"` is KL(teacher ‖ student), `"reverse_kl"` is KL(student ‖ teacher), or
            `"jsd"`.
        beta: the interpolation of `"jsd"`, in [0, 1].
        support: `"tail"` or `"renormalized"`.
        top_p: adaptive K, in (0, 1]: per token, only the fewest teacher tokens whose mass reaches it.
        student_log_tail: `(tokens,)`, the student's log-mass outside the k tokens. By default one minus their mass,
            which loses its digits once the student is sure of them; who can sum the rest itself should.
        teacher_log_tail: `(tokens,)`, the same of the teacher.

    Returns:
        `(tokens,)`, in nats, ≥ 0; float32 (float64 for float64 input); not yet multiplied by T².

    Raises:
        ValueError: for an unknown or refused combination, a `beta` or `top_p` out of range, or unequal shapes.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2, on K + 1 events; JSD: Agarwal et al. 2023
    (arXiv:2306.13649), equation 1.
    """
    check_divergence(divergence, beta, support, top_p)
    if student_log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            "Student and teacher log-probabilities must be of the same ids, but have the shapes "
            f"{tuple(student_log_probs.shape)} and {tuple(teacher_log_probs.shape)}."
        )
    dtype = accumulator(student_log_probs.dtype)
    teacher = truncate_to_top_p(teacher_log_probs, top_p).to(dtype)
    student = student_log_probs.to(dtype).clamp_min(LOG_ZERO)
    kept = teacher > LOG_ZERO
    teacher = teacher.masked_fill(~kept, LOG_ZERO)

    if support == "renormalized":
        student, teacher = student.masked_fill(~kept, LOG_ZERO).log_softmax(-1), teacher.log_softmax(-1)
    else:
        student_tail = _log_tail(student, kept, student_log_tail)
        teacher_tail = _log_tail(teacher_log_probs.to(dtype), kept, teacher_log_tail)
        if student_log_tail is not None:
            # No token is left outside (K = V): what the teacher's K seem to lack of 1 is rounding.
            teacher_tail = teacher_tail.masked_fill(student_tail < LOG_ZERO / 2, LOG_ZERO)
        student = torch.cat([student.masked_fill(~kept, LOG_ZERO), student_tail], dim=-1)
        teacher = torch.cat([teacher, teacher_tail], dim=-1)
    value = DIVERGENCES[divergence](student, teacher, beta).sum(-1)
    # Rounding alone can take an (almost) zero divergence below 0: lift the value, leave the gradient.
    value = value + (value.clamp_min(0) - value).detach()
    return torch.where(kept.any(-1), value, 0.0)


def check_divergence(divergence: str, beta: float, support: str, top_p: float) -> None:
    """Raise `ValueError` for settings of `topk_divergence` that are unknown, out of range or unsound together."""
    for name, value, choices in (
        ("divergence", divergence, tuple(DIVERGENCES)),
        ("support", support, get_args(Support)),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must be between 0 (forward KL) and 1 (reverse KL), but is {beta}.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be above 0 and at most 1 (all K tokens), but is {top_p}.")
    if support == "renormalized" and divergence != "forward_kl":
        raise ValueError(
            f"`divergence={divergence!r}` needs `support='tail'`: on the renormalized Top-K tokens nothing keeps the "
            "student from moving its mass to all other tokens."
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 where that was given."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_tail(
    log_probs: Float[Tensor, "tokens k"], kept: Bool[Tensor, "tokens k"], outside: Float[Tensor, " tokens"] | None
) -> Float[Tensor, "tokens 1"]:
    """The mass of all tokens that are not kept: one minus the others, or `outside` plus that of the given ones."""
    if outside is None:
        return _log_complement(log_probs.masked_fill(~kept, LOG_ZERO))
    parts = torch.cat([outside.to(log_probs)[:, None], log_probs.masked_fill(kept, LOG_ZERO)], dim=-1)
    return parts.clamp_min(LOG_ZERO).logsumexp(-1, keepdim=True)


def _log_complement(log_probs: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens 1"]:
    """`log(1 - sum(exp(log_probs)))`, at least log(eps), for sums that rounding takes to 1 and beyond."""
    total = log_probs.logsumexp(-1, keepdim=True).clamp_max(-torch.finfo(log_probs.dtype).eps)
    return torch.log(-torch.expm1(total))


def _kl_terms(
    log_p: Float[Tensor, "tokens buckets"], log_q: Float[Tensor, "tokens buckets"]
) -> Float[Tensor, "tokens buckets"]:
    # `q - p` sums to 0; it makes each term ≥ 0, so rounding (masses that do not quite sum to 1) cannot add up.
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_q) + (q - p)


def _jsd_terms(
    student: Float[Tensor, "tokens buckets"], teacher: Float[Tensor, "tokens buckets"], beta: float
) -> Float[Tensor, "tokens buckets"]:
    if beta in (0.0, 1.0):
        return _kl_terms(student, teacher) if beta else _kl_terms(teacher, student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda student, teacher, beta: _kl_terms(teacher, student),
    "reverse_kl": lambda student, teacher, beta: _kl_terms(student, teacher),
    "jsd": _jsd_terms,
}
"""The divergences by the name that options and configs know them by: `f(student, teacher, beta)`, from the log-probabilities of both on
the same events, `(tokens, buckets)` with `LOG_ZERO` for log 0, gives the terms of the sum. Autograd does the rest. Over the whole
vocabulary, where there is no support, a divergence also wants the gradient that `_tiles.dense_divergence_` writes by hand."""
