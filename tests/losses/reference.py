"""The loss, written from its formula: dense, float64, full-vocabulary log-softmax, plain sums and loops over tokens.

It shares no code with the package, on purpose, and is slow, on purpose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def dense_divergence(teacher: Tensor, student: Tensor, divergence: str = "forward_kl", beta: float = 0.5) -> Tensor:
    """Divergence of two lists of probabilities that each sum to 1."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return sum((x * torch.log(x / y) for x, y in zip(a, b, strict=True) if x > 0), start=torch.zeros(()).double())

    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return kl(teacher, student)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def support_of(ids: list[int], log_probs: list[float], top_p: float = 1.0) -> dict[int, float]:
    """Teacher probability by id: those that are there, as far as `top_p` asks for."""
    kept: dict[int, float] = {}
    for token, log_prob in zip(ids, log_probs, strict=True):
        if token >= 0 and math.exp(log_prob) > 0 and (top_p == 1.0 or sum(kept.values()) < top_p):
            kept[token] = math.exp(log_prob)
    return kept


def sparse_divergence(
    student: Tensor,
    support: dict[int, float],
    divergence: str = "forward_kl",
    beta: float = 0.5,
    kind: str = "tail",
) -> Tensor:
    """Divergence between teacher and one row of student probabilities `(vocab,)` on a support."""
    ids = list(support)
    if not ids:
        return torch.zeros(()).double()
    p = torch.tensor(list(support.values()), dtype=torch.float64)
    q = student[ids]
    if kind == "renormalized":
        return dense_divergence(p / p.sum(), q / q.sum(), divergence, beta)
    others = [token for token in range(len(student)) if token not in support]
    if others:
        p = torch.cat([p, (1 - p.sum())[None]])
        q = torch.cat([q, student[others].sum()[None]])
    else:
        p = p / p.sum()  # all tokens are on the support: what is missing of 1 is rounding
    return dense_divergence(p, q, divergence, beta)


def live_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    vocab_size: int,
    top_k: int | None,
    on: str,
    temperature: float,
    top_p: float,
    divergence: str,
    beta: float,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence between two rows of logits on the ids they share, and what both give the support."""
    p = torch.softmax(teacher[:vocab_size].double() / temperature, -1)
    q = torch.softmax(student[:vocab_size] / temperature, -1)
    if top_k is None:
        return dense_divergence(p, q, divergence, beta), p.sum(), q.sum()
    chosen = (p if on == "teacher" else q).topk(min(top_k, vocab_size)).indices
    ids = list(support_of(chosen.tolist(), p[chosen].log().tolist(), top_p))
    others = [token for token in range(vocab_size) if token not in ids]
    masses = p[ids].sum(), q[ids].sum()
    if kind == "renormalized":
        p, q = p[ids] / p[ids].sum(), q[ids] / q[ids].sum()
    elif others:
        p, q = torch.cat([p[ids], p[others].sum()[None]]), torch.cat([q[ids], q[others].sum()[None]])
    else:
        p, q = p[ids], q[ids]
    return dense_divergence(p, q, divergence, beta), *masses


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """What the head says, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    live: tuple[Tensor, dict[str, Any]] | None = None,
    reference: Tensor | tuple[Tensor, Tensor] | None = None,
    sft_weight: Tensor,
    kd_weight: Tensor,
    kl_weight: Tensor,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    support: str = "tail",
    top_p: float = 1.0,
    scale_by_t2: bool = True,
    kl_direction: str = "reverse",
) -> dict[str, Tensor]:
    """The loss and its parts per token from full logits.

    `teacher` is ids and log-probabilities; `live` is a teacher's logits and how to compare with them; `reference` is
    logits, or ids and log-probabilities.
    """
    zero = logits.sum() * 0
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("nll", "kd", "kl", "entropy", "teacher_mass", "student_mass")
    }
    loss = zero
    for t, label in enumerate(labels.tolist()):
        row = dict.fromkeys(parts, zero)
        if label != -100:
            log_probs = torch.log_softmax(logits[t], -1)
            row["nll"] = -log_probs[label]
            row["entropy"] = -(log_probs.exp() * log_probs).sum()
            if teacher is not None:
                tempered = torch.softmax(logits[t] / temperature, -1)
                mass = support_of(teacher[0][t].tolist(), teacher[1][t].double().tolist(), top_p)
                factor = temperature**2 if scale_by_t2 else 1.0
                row["kd"] = factor * sparse_divergence(tempered, mass, divergence, beta, support)
                row["teacher_mass"] = zero + sum(mass.values())
                row["student_mass"] = zero + sum(tempered[token] for token in mass)
            if live is not None:
                shared = {"temperature": temperature, "top_p": top_p, "divergence": divergence, "beta": beta}
                kd, row["teacher_mass"], row["student_mass"] = live_divergence(
                    logits[t], live[0][t], **shared, kind=support, **live[1]
                )
                row["kd"] = kd * (temperature**2 if scale_by_t2 else 1.0)
            if isinstance(reference, tuple):
                mass = support_of(reference[0][t].tolist(), reference[1][t].double().tolist())
                row["kl"] = sparse_divergence(log_probs.exp(), mass, f"{kl_direction}_kl")
            elif reference is not None:
                other = torch.softmax(reference[t][: logits.shape[1]], -1)
                row["kl"] = dense_divergence(other, log_probs.exp(), f"{kl_direction}_kl")
        for name, value in row.items():
            parts[name].append(value)
        loss = loss + sft_weight[t] * row["nll"] + kd_weight[t] * row["kd"] + kl_weight[t] * row["kl"]
    return {"loss": loss, **{name: torch.stack(values) for name, values in parts.items()}}
