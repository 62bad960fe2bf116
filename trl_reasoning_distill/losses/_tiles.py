"""A second model's tile of logits beside the student's: its Top-K, or a divergence over the whole vocabulary.

In torch, by blocks of rows (see `_rows.blocks`), float32 whatever the tile is: the path for the CPU, and the reference for `_triton_tiles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_reasoning_distill.losses._rows import blocks
from trl_reasoning_distill.losses.divergence import LOG_ZERO, TopKTargets, accumulator
from trl_reasoning_distill.losses.head import Head
from trl_reasoning_distill.losses.topk import exact_top_k

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


DENSE_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
"""Those of `DIVERGENCES` that `dense_divergence_` has the gradient of."""


def top_k_targets(
    tile: Float[Tensor, "tokens vocab"],
    hidden: Float[Tensor, "tokens hidden"],
    teacher: Head,
    student: Float[Tensor, "tokens vocab"],
    top_k: int,
    on: str,
    temperature: float,
) -> tuple[TopKTargets, Bool[Tensor, " tokens"]]:
    """The teacher, whose logits are `tile`, on its own Top-K or on the student's; and whether the two agree on the first."""
    dtype, tokens = accumulator(tile.dtype), len(tile)
    ids = torch.empty(tokens, min(top_k, tile.shape[1]), dtype=torch.long, device=tile.device)
    log_probs = torch.empty(ids.shape, dtype=dtype, device=tile.device)
    log_tail = log_probs.new_empty(tokens)
    agrees = torch.empty(tokens, dtype=torch.bool, device=tile.device)
    for rows, z, buffer in blocks(tile, dtype):
        other = buffer.copy_(student[rows])
        chooser, judge = (z, other) if on == "teacher" else (other, z)
        ids[rows] = exact_top_k(chooser, ids.shape[1])[1]
        # Not `argmax` of both: finding the position of a maximum is slow on the CPU, and one position is known.
        agrees[rows] = judge.gather(1, ids[rows, :1])[:, 0] == judge.amax(-1)
        named = teacher.named_logits(tile[rows], hidden[rows], ids[rows])
        top = z.gather(1, ids[rows, :1]) if on == "teacher" else z.amax(-1, keepdim=True)
        # Relative to its own largest: beside a teacher that is sure of its Top-K, all else underflows.
        z.scatter_(1, ids[rows], -torch.inf)
        second = z.amax(-1, keepdim=True).clamp_min_(LOG_ZERO)
        rest = torch.sub(z, second, out=buffer).div_(temperature).exp_().sum(-1, keepdim=True).log_()
        rest += (second - top) / temperature
        logits = torch.cat([(named - top) / temperature, rest.clamp_min_(LOG_ZERO)], -1).log_softmax(-1)
        log_probs[rows], log_tail[rows] = logits[:, :-1], logits[:, -1]
    return TopKTargets(ids, log_probs, log_tail), agrees


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
    """Divergence between another model and the student over the vocabulary, and whether their first tokens agree.

    `tile`, the other's logits, becomes the gradient of `weight * divergence` with respect to the student's projection,
    whose scale and soft-cap have made `student`; without a `weight` it is left alone. With p the other's probabilities and q the student's (at the
    temperature T), m = βp + (1 − β)q and d/dz of the student's logits:

        KL(p ‖ q): (q − p) / T        KL(q ‖ p): q · (log q/p − KL) / T        JSD: (1 − β) q · (log q/m − KL(q ‖ m)) / T
    """
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "reverse_kl" if beta else "forward_kl"
    values = torch.empty(len(tile), dtype=accumulator(student.dtype), device=tile.device)
    agrees = torch.empty(len(tile), dtype=torch.bool, device=tile.device)
    factor = None if weight is None else weight[:, None] * (logit_scale / temperature)
    for rows, z, buffer in blocks(student, values.dtype):
        slope = None if logit_softcap is None or factor is None else 1 - (z / logit_softcap).square_()
        first = z.argmax(-1, keepdim=True)
        log_q = z.div_(temperature).log_softmax(-1).clamp_min_(LOG_ZERO)
        log_p = buffer.copy_(tile[rows]).div_(temperature).log_softmax(-1).clamp_min_(LOG_ZERO)
        agrees[rows] = log_p.gather(1, first)[:, 0] == log_p.amax(-1)
        q, p = torch.exp(log_q, out=z), torch.exp(log_p, out=buffer)
        if divergence == "forward_kl":
            values[rows] = torch.linalg.vecdot(p, log_p.sub_(log_q))
            gradient = q.sub_(p)
        else:
            share, other = 1.0, log_p
            if divergence == "jsd":
                share, other = 1 - beta, torch.lerp(q, p, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
            excess = log_q.sub_(other)
            kl = torch.linalg.vecdot(q, excess)
            values[rows] = share * kl
            if divergence == "jsd":
                values[rows] += beta * torch.linalg.vecdot(p, log_p.sub_(other))
            gradient = q.mul_(excess.sub_(kl[:, None])).mul_(share)
        if factor is not None:
            tile[rows] = gradient.mul_(factor[rows]) if slope is None else gradient.mul_(factor[rows]).mul_(slope)
    return values.clamp_min_(0), agrees
