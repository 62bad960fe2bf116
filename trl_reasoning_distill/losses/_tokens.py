"""The loss of each token as a small function of a few of its logits.

A row of logits enters the loss only through a few of its entries (the label, the teacher's Top-K) and through one
log-sum-exp of all others. So the loss is a differentiable function of `entries + 1` logits per token, written once in
`token_losses`; autograd differentiates that, and the gradient of a log-sum-exp is a softmax over the rest of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trl_reasoning_distill.losses._rows import RowStatistics
from trl_reasoning_distill.losses.divergence import (
    LOG_ZERO,
    DivergenceFunction,
    Support,
    TopKTargets,
    topk_divergence,
)
from trl_reasoning_distill.losses.head import Head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class LossSettings:
    """What is the same for all tokens; see `fused_linear_distillation_loss`.

    The heads are those of a live teacher and of a linear reference, cut to the ids that they share with the student.
    `shared_ids` is the number of ids that the distillation loss is about, None for all.
    """

    temperature: float
    divergence: str | DivergenceFunction
    beta: float
    support: Support
    top_p: float
    scale_by_t2: bool
    kl_direction: str
    chunk_size: int
    needs_grad: bool
    reference_head: Head | None = None
    teacher_head: Head | None = None
    top_k: int | None = None
    on: str = "teacher"
    shared_ids: int | None = None

    @property
    def in_float32(self) -> bool:
        """Whether whole rows of two models are subtracted: near convergence, 16 bits keep little of the difference."""
        return self.reference_head is not None or (self.teacher_head is not None and self.top_k is None)


@dataclass(frozen=True)
class TokenTargets:
    """What each supervised token is compared with, and how much it counts; the Top-K are `truncated`."""

    labels: Int[Tensor, " tokens"]
    sft_weight: Float[Tensor, " tokens"]
    kd_weight: Float[Tensor, " tokens"]
    kl_weight: Float[Tensor, " tokens"]
    teacher: TopKTargets | None
    reference: TopKTargets | None
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"] | None
    reference_hidden: Float[Tensor, "tokens reference_hidden"] | None

    def __getitem__(self, tokens: slice) -> TokenTargets:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        parts.update({name: part[tokens] for name, part in parts.items() if part is not None})
        return TokenTargets(**parts)

    def weighted(self, factor: Tensor) -> TokenTargets:
        """The same with each weight times `factor`."""
        names = ("sft_weight", "kd_weight", "kl_weight")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


class DenseTerms(NamedTuple):
    """What was computed over the whole vocabulary beforehand, None where there is no such term; without a graph."""

    kd: Float[Tensor, " tokens"] | None
    kl: Float[Tensor, " tokens"] | None
    top1_agreement: Bool[Tensor, " tokens"] | None


class TokenValues(NamedTuple):
    """What is reported per supervised token, and what is differentiated: `loss`."""

    loss: Float[Tensor, " tokens"]
    nll: Float[Tensor, " tokens"]
    kd: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    is_top1: Bool[Tensor, " tokens"]
    teacher_mass: Float[Tensor, " tokens"]
    student_mass: Float[Tensor, " tokens"]
    top1_agreement: Bool[Tensor, " tokens"]


class TokenGradients(NamedTuple):
    """Of the loss of each token with respect to what it is a function of.

    Attributes:
        z: `(tokens, entries)`, the named logits.
        log_sum_exps: of the rest of the row, and of its padding where that stands apart.
        log_sum_exp_t: of the rest at the temperature, None at 1.
    """

    z: Float[Tensor, "tokens entries"]
    log_sum_exps: list[Float[Tensor, " tokens"]]
    log_sum_exp_t: Float[Tensor, " tokens"] | None


class Entries(NamedTuple):
    """The entries of each row that the loss names one by one: the label, then the Top-K ids, each once.

    Attributes:
        ids: `(tokens, entries)`, token ids, always valid: a missing id is replaced by the label.
        slot: `(tokens, entries)`, for each entry the first of the row with the same id.
        is_unique: whether an entry is that first one.
    """

    ids: Int[Tensor, "tokens entries"]
    slot: Int[Tensor, "tokens entries"]
    is_unique: Bool[Tensor, "tokens entries"]

    @classmethod
    def of(cls, targets: TokenTargets) -> Entries:
        named = [topk.ids.long() for topk in (targets.teacher, targets.reference) if topk is not None]
        ids = torch.cat([targets.labels[:, None], *named], dim=-1)
        ids = torch.where(ids < 0, ids[:, :1], ids)
        slot = _first_occurrence(ids)
        return cls(ids, slot, slot == torch.arange(ids.shape[1], device=ids.device))

    def of_tokens(self, tokens: slice) -> Entries:
        """Those of some tokens only."""
        return Entries(self.ids[tokens], self.slot[tokens], self.is_unique[tokens])

    def place(self, topk: TopKTargets, start: int) -> Float[Tensor, "tokens entries"]:
        """A teacher's log-probabilities on the entries, -inf where it says nothing; its ids are those from `start` on."""
        empty = topk.log_probs.new_full(self.ids.shape, -torch.inf)
        return empty.scatter_reduce(1, self.slot[:, start : start + topk.ids.shape[1]], topk.log_probs, "amax")


def _first_occurrence(ids: Int[Tensor, "tokens entries"]) -> Int[Tensor, "tokens entries"]:
    """For each entry of a row, the position of the first entry that equals it."""
    ordered, order = ids.sort(dim=-1, stable=True)
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts_run = torch.ones_like(ids, dtype=torch.bool)
    starts_run[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run_start = torch.where(starts_run, position, 0).cummax(dim=-1).values
    return torch.empty_like(ids).scatter_(1, order, order.gather(1, run_start))


def differentiated(
    z: Float[Tensor, "tokens entries"],
    rest: RowStatistics,
    padding: RowStatistics | None,
    entries: Entries,
    targets: TokenTargets,
    settings: LossSettings,
    dense: DenseTerms,
) -> tuple[TokenValues, TokenGradients]:
    """`token_losses` and its gradient, by autograd."""
    has_temperature = targets.teacher is not None and settings.temperature != 1.0
    leaves = [z, rest.log_sum_exp]
    leaves += [] if padding is None else [padding.log_sum_exp]
    leaves += [rest.log_sum_exp_t] if has_temperature else []
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        values = token_losses(z, rest, padding, entries, targets, settings, dense)
        grad_z, *grads = torch.autograd.grad(values.loss.sum(), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    grad_t = grads.pop() if has_temperature else None
    return TokenValues(*(value.detach() for value in values)), TokenGradients(grad_z, grads, grad_t)


def token_losses(
    z: Float[Tensor, "tokens entries"],
    rest: RowStatistics,
    padding: RowStatistics | None,
    entries: Entries,
    targets: TokenTargets,
    settings: LossSettings,
    dense: DenseTerms,
) -> TokenValues:
    """The loss as a function of the named logits `z` and the log-sum-exps of the rest of each row.

    `padding` is the part of the rest that is none of the shared ids; the distillation loss does without it.
    """
    whole = rest if padding is None or settings.shared_ids is None else rest.joined(padding, settings.shared_ids)
    log_probs, log_rest = _log_softmax(z, whole.log_sum_exp)
    nll = -log_probs[:, 0]  # the label is always the first entry
    with torch.no_grad():
        log_z = z[:, 0] + nll
        entropy = log_z - ((log_probs.exp() * z).sum(-1) + log_rest.exp() * whole.mean)
        top1 = _top1(z, whole, entries)
        zero = torch.zeros_like(nll)
    loss = targets.sft_weight * nll

    kd = teacher_mass = student_mass = zero
    agrees = torch.zeros_like(top1, dtype=torch.bool)
    if targets.teacher is not None:
        log_probs_t, log_rest_t = log_probs, log_rest
        if settings.temperature != 1.0 or padding is not None:
            log_probs_t, log_rest_t = _shared_log_softmax(z, rest, entries, settings)
        teacher = entries.place(targets.teacher, start=1)
        kd = _topk_kd(log_probs_t, teacher, log_rest_t, targets.teacher.log_tail, settings)
        loss = loss + targets.kd_weight * kd
        with torch.no_grad():
            teacher_mass = teacher.exp().sum(-1).to(z.dtype)
            student_mass = torch.where(teacher > -torch.inf, log_probs_t.exp(), 0).sum(-1)
            agrees = (top1 == entries.ids.gather(1, teacher.argmax(-1, keepdim=True))[:, 0]) & (teacher_mass > 0)
    elif dense.kd is not None:
        kd, teacher_mass, student_mass = dense.kd, torch.ones_like(zero), torch.ones_like(zero)
        loss = loss + targets.kd_weight * kd
    if dense.top1_agreement is not None:
        agrees = dense.top1_agreement

    kl = zero if dense.kl is None else dense.kl
    if targets.reference is not None:
        start = 1 if targets.teacher is None else 1 + targets.teacher.ids.shape[1]
        kl = topk_divergence(
            log_probs,
            entries.place(targets.reference, start),
            divergence="forward_kl" if settings.kl_direction == "forward" else "reverse_kl",
            student_log_tail=log_rest,
            teacher_log_tail=targets.reference.log_tail,
        )
    loss = loss + targets.kl_weight * kl
    return TokenValues(loss, nll, kd, kl, entropy, top1 == targets.labels, teacher_mass, student_mass, agrees)


def _topk_kd(
    student: Float[Tensor, "tokens entries"],
    teacher: Float[Tensor, "tokens entries"],
    student_log_tail: Float[Tensor, " tokens"],
    teacher_log_tail: Float[Tensor, " tokens"] | None,
    settings: LossSettings,
) -> Float[Tensor, " tokens"]:
    """The divergence on the named entries, times T² if asked for."""
    if callable(settings.divergence):
        kd = settings.divergence(student, teacher, student_log_tail)
        kd = torch.where((teacher > -torch.inf).any(-1), kd, 0.0)
    else:
        kd = topk_divergence(
            student,
            teacher,
            divergence=settings.divergence,
            beta=settings.beta,
            support=settings.support,
            student_log_tail=student_log_tail,
            teacher_log_tail=teacher_log_tail,
        )
    return kd * settings.temperature**2 if settings.scale_by_t2 else kd


def _shared_log_softmax(
    z: Float[Tensor, "tokens entries"], rest: RowStatistics, entries: Entries, settings: LossSettings
) -> tuple[Float[Tensor, "tokens entries"], Float[Tensor, " tokens"]]:
    """As `_log_softmax`, at the temperature and over the shared ids only."""
    present = entries.is_unique
    if settings.shared_ids is not None:
        present = present & (entries.ids < settings.shared_ids)
    # What is empty (a missing entry, a rest where every token is named) is so at any temperature.
    return _log_softmax(
        torch.where(present, z / settings.temperature, LOG_ZERO),
        torch.where(rest.max > LOG_ZERO / 2, rest.log_sum_exp_t, LOG_ZERO),
    )


def _log_softmax(
    z: Float[Tensor, "tokens entries"], log_sum_exp: Float[Tensor, " tokens"]
) -> tuple[Float[Tensor, "tokens entries"], Float[Tensor, " tokens"]]:
    """Log-probabilities of the named entries, and of all the rest together."""
    log_probs = torch.cat([z, log_sum_exp[:, None]], dim=-1).log_softmax(-1)
    return log_probs[:, :-1], log_probs[:, -1]


def _top1(z: Tensor, rest: RowStatistics, entries: Entries) -> Int[Tensor, " tokens"]:
    """The student's most likely token, the lowest id of equals; -1 where it is not a named one."""
    best = z.amax(-1)
    named = entries.ids.masked_fill(z < best[:, None], torch.iinfo(torch.long).max).amin(-1)
    return torch.where((best >= rest.max) & (named < rest.first_tie), named, -1)
