"""The language-model head and all terms of the loss, a chunk of tokens at a time, with the gradient in the forward pass.

What the loss is stands in `_tokens`, what it costs stands here: per chunk one tile of logits, which turn into their own
gradient in place, and three matmuls.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_reasoning_distill.losses import _rows
from trl_reasoning_distill.losses._tiles import dense_divergence_, top_k_targets
from trl_reasoning_distill.losses._tokens import (
    DenseTerms,
    Entries,
    LossSettings,
    TokenTargets,
    TokenValues,
    token_losses,
)
from trl_reasoning_distill.losses.divergence import LOG_ZERO, accumulator
from trl_reasoning_distill.losses.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float

# Rows of the head's gradient that are summed at a time where the matmul cannot write float32 itself.
_ACCUMULATION_ROWS = 8192
# Tokens at a time for which a second model's logits exist beside the student's.
_CPU_SECOND_TILE, _ACCELERATOR_SECOND_TILE = 256, 1024


class FusedHead(torch.autograd.Function):
    """Projection, loss and gradients of all supervised tokens; `backward` only scales what `forward` has computed.

    Nothing but the gradients is kept for the backward pass: neither the head's weight nor the logits. So a weight that
    was gathered for the forward pass (ZeRO-3) may be released before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        logit_scale: float,
        logit_softcap: float | None,
        targets: TokenTargets,
        settings: LossSettings,
    ) -> tuple[Tensor, ...]:
        needs_grad = [settings.needs_grad and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            student = Head(weight, bias, logit_scale, logit_softcap)
            values, grads = _run(hidden, student, targets, settings, needs_grad)
        ctx.save_for_backward(*grads)
        loss = values.loss.sum()
        ctx.mark_non_differentiable(*values[1:])
        return loss, *values[1:]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the head's gradient would be the largest tensor of the step. A second backward
        # pass through the same graph is refused by autograd, which sees that a saved tensor has changed.
        grads = ctx.saved_tensors
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # looking would make an accelerator wait
            grads = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return *grads, None, None, None, None


def _run(
    hidden: Float[Tensor, "tokens hidden"],
    student: Head,
    targets: TokenTargets,
    settings: LossSettings,
    needs_grad: list[bool],
) -> tuple[TokenValues, list[Tensor | None]]:
    """Walk over chunks of tokens; gradients are None where not needed."""
    weight, bias = student.weight, student.bias
    dtype, device = hidden.dtype, hidden.device.type
    student = student.first(len(weight), dtype)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = _WeightGradient(weight, one_chunk=len(hidden) <= settings.chunk_size) if needs_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=accumulator(dtype)) if needs_grad[2] and bias is not None else None
    values = []
    for start in range(0, len(hidden), settings.chunk_size):
        rows = slice(start, start + settings.chunk_size)
        logits = student.logits(hidden[rows])
        tile = len(logits)
        if settings.teacher_head is not None or settings.reference_head is not None:
            tile = _CPU_SECOND_TILE if device == "cpu" else _ACCELERATOR_SECOND_TILE
        for first in range(0, len(logits), tile):
            part = slice(first, first + tile)
            near = hidden[rows][part], targets[rows][part], student, settings, any(needs_grad)
            values.append(_losses_and_gradient_(logits[part], *near))
        if grad_hidden is not None:
            torch.mm(logits, student.weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(logits, hidden[rows])
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        del logits  # before the next tile is made
    if not values:
        values.append(_no_tokens(hidden))
    return TokenValues(*(torch.cat(parts) for parts in zip(*values, strict=True))), [
        grad_hidden,
        None if grad_weight is None else grad_weight.result(),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    ]


class _WeightGradient:
    """The sum of the chunks' gradients of the head, in float32 unless there is only one."""

    def __init__(self, weight: Tensor, one_chunk: bool) -> None:
        self.weight, self.one_chunk = weight, one_chunk
        self.total: Tensor | None = None

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        dtype = grad_logits.dtype
        if self.total is None:
            if self.one_chunk or dtype == accumulator(dtype):
                self.total = torch.mm(grad_logits.t(), hidden)
                return
            self.total = torch.zeros_like(self.weight, dtype=accumulator(dtype))
        if self.total.dtype == dtype:
            self.total.addmm_(grad_logits.t(), hidden)
        elif self.total.device.type == "cuda":
            torch.addmm(self.total, grad_logits.t(), hidden, out_dtype=self.total.dtype, out=self.total)
        else:
            for start in range(0, len(self.total), _ACCUMULATION_ROWS):
                rows = slice(start, start + _ACCUMULATION_ROWS)
                self.total[rows] += torch.mm(grad_logits[:, rows].t(), hidden)

    def result(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)


def _losses_and_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    hidden: Float[Tensor, "tokens hidden"],
    targets: TokenTargets,
    student: Head,
    settings: LossSettings,
    needs_grad: bool,
) -> TokenValues:
    """The values of some tokens; `logits` become the gradient with respect to the projection, or are spoilt."""
    targets, dense, dense_gradients = _second_models(logits, targets, student, settings, needs_grad)
    entries = Entries.of(targets)
    tokens = torch.arange(len(logits), device=logits.device)[:, None]
    z = student.named_logits(logits, hidden, entries.ids).masked_fill_(~entries.is_unique, LOG_ZERO)
    # What is left in the tile is the rest of the row. (Not `scatter_`: on the CPU it goes through a float32 copy of it all.)
    logits[tokens, entries.ids] = LOG_ZERO
    temperature = 1.0 if targets.teacher is None else settings.temperature
    kernels = _row_kernels(logits.device.type, logits.dtype)
    # The ids that a live teacher shares, and those that only the likelihood knows.
    parts = logits.tensor_split([settings.shared_ids or logits.shape[1]], dim=1)
    temperatures = (temperature, 1.0)
    rows = [
        kernels.row_statistics(part, t, z.amax(-1)) for part, t in zip(parts, temperatures, strict=True) if part.numel()
    ]

    with torch.set_grad_enabled(needs_grad):
        leaves = [z, *(row.log_sum_exp for row in rows)] + ([rows[0].log_sum_exp_t] if temperature != 1.0 else [])
        if needs_grad:
            leaves = [leaf.requires_grad_() for leaf in leaves]
        padding = rows[1] if len(rows) > 1 else None
        values = token_losses(z, rows[0], padding, entries, targets, settings, dense)
        grads = torch.autograd.grad(values.loss.sum(), leaves) if needs_grad else ()
    values = TokenValues(*(value.detach() for value in values))
    if not needs_grad:
        return values

    grads_t = (grads[-1] / temperature if temperature != 1.0 else None, None)
    head = (student.logit_scale, student.logit_softcap)
    for part, row, grad, grad_t, t in zip(parts, rows, grads[1:], grads_t, temperatures, strict=False):
        kernels.row_gradient_(part, row.detached(), grad, grad_t, t, *head)
    grad_z = grads[0] * student.slope(z.detach())
    logits[tokens, entries.ids] = grad_z.gather(1, entries.slot).to(logits.dtype)
    for gradient in dense_gradients:
        logits[:, : gradient.shape[1]] += gradient
    return values


def _second_models(
    logits: Float[Tensor, "tokens vocab"],
    targets: TokenTargets,
    student: Head,
    settings: LossSettings,
    needs_grad: bool,
) -> tuple[TokenTargets, DenseTerms, list[Tensor]]:
    """What a live teacher and a linear reference have to say: a Top-K joins the targets, the rest is done here.

    Returns the targets, the terms over the whole vocabulary, and the gradients of these with respect to the projection.
    """
    terms = DenseTerms(None, None, None)
    gradients = []
    head = (student.logit_scale, student.logit_softcap)
    if settings.reference_head is not None and targets.reference_hidden is not None:
        tile = settings.reference_head.logits(targets.reference_hidden)
        direction = "forward_kl" if settings.kl_direction == "forward" else "reverse_kl"
        weight = targets.kl_weight if needs_grad else None
        kl, _ = dense_divergence_(tile, logits, weight, direction, 0.0, 1.0, *head)
        terms = terms._replace(kl=kl)
        gradients.append(tile)
    teacher, teacher_hidden = settings.teacher_head, targets.teacher_hidden
    if teacher is not None and teacher_hidden is not None:
        tile = teacher.logits(teacher_hidden)
        shared, temperature = logits[:, : tile.shape[1]], settings.temperature
        if settings.top_k is not None:
            topk, agrees = top_k_targets(
                tile, teacher_hidden, teacher, shared, settings.top_k, settings.on, temperature
            )
            targets = replace(targets, teacher=topk.truncated(settings.top_p))
        else:
            assert not callable(settings.divergence)
            factor = temperature**2 if settings.scale_by_t2 else 1.0
            weight = targets.kd_weight * factor if needs_grad else None
            kd, agrees = dense_divergence_(tile, shared, weight, settings.divergence, settings.beta, temperature, *head)
            terms = terms._replace(kd=kd * factor)
            gradients.append(tile)
        terms = terms._replace(top1_agreement=agrees)
    return targets, terms, gradients


@functools.cache
def _row_kernels(device: str, dtype: torch.dtype) -> ModuleType:
    """Triton's where there is a GPU and Triton (which ships with PyTorch for CUDA), else torch's."""
    if device == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("trl_reasoning_distill.losses._triton_rows")
    return _rows


def _no_tokens(hidden: Tensor) -> TokenValues:
    floats = hidden.new_zeros(0, dtype=accumulator(hidden.dtype))
    flags = floats.bool()
    return TokenValues(floats, floats, floats, floats, floats, flags, floats, floats, flags)
