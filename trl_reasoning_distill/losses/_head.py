"""The language-model head and all terms of the loss, a chunk of tokens at a time, with the gradient in the forward pass.

What the loss is stands in `_tokens`, what it costs stands here: per chunk one tile of logits, which turn into their own
gradient in place, and three matmuls.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_reasoning_distill.losses import _rows
from trl_reasoning_distill.losses._tokens import Entries, LossSettings, TokenTargets, TokenValues, token_losses
from trl_reasoning_distill.losses.divergence import LOG_ZERO, accumulator

if TYPE_CHECKING:
    from jaxtyping import Float

# Rows of the head's gradient that are summed at a time where the matmul cannot write float32 itself.
_ACCUMULATION_ROWS = 8192


@dataclass(frozen=True)
class LinearReference:
    """A reference model's distribution as its last hidden states and its head: the logits are made a chunk at a time.

    Attributes:
        hidden: `(tokens, hidden)`, one row per token of the student's, in the same order.
        weight: `(vocab, hidden)`, the reference's head. Rows beyond the student's vocabulary (padding of the embedding)
            are not part of the distribution.
        bias: `(vocab,)`, if the head has one.
        logit_scale: factor on the reference's logits.
        logit_softcap: soft-cap of the reference's logits.
    """

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


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
        targets: TokenTargets,
        settings: LossSettings,
        reference_head: LinearReference | None,
    ) -> tuple[Tensor, ...]:
        needs_grad = [settings.needs_grad and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            values, grads = _run(hidden, weight, bias, targets, settings, reference_head, needs_grad)
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
        return *grads, None, None, None


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: TokenTargets,
    settings: LossSettings,
    reference_head: LinearReference | None,
    needs_grad: list[bool],
) -> tuple[TokenValues, list[Tensor | None]]:
    """Walk over chunks of tokens; gradients are None where not needed."""
    dtype = hidden.dtype
    head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = _WeightGradient(weight, one_chunk=len(hidden) <= settings.chunk_size) if needs_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=accumulator(dtype)) if needs_grad[2] and bias is not None else None
    values = []
    for start in range(0, len(hidden), settings.chunk_size):
        rows = slice(start, start + settings.chunk_size)
        logits = _project(hidden[rows], head, head_bias, settings.logit_scale, settings.logit_softcap)
        values.append(_losses_and_gradient_(logits, targets[rows], settings, reference_head, any(needs_grad)))
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(logits, hidden[rows])
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        del logits
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


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, logit_softcap: float | None
) -> Float[Tensor, "tokens vocab"]:
    """The logits, as the model's own forward pass rounds them."""
    logits = torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if logit_softcap is not None:
        logits.div_(logit_softcap).tanh_().mul_(logit_softcap)
    return logits


def _losses_and_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    targets: TokenTargets,
    settings: LossSettings,
    reference_head: LinearReference | None,
    needs_grad: bool,
) -> TokenValues:
    """The values of a chunk's tokens; `logits` become the gradient with respect to the projection, or are spoilt."""
    reference_gradient, reference_kl = None, None
    if reference_head is not None:
        reference_gradient, reference_kl = _full_vocabulary_kl(logits, targets, settings, reference_head)
    entries = Entries.of(targets)
    z = logits.gather(1, entries.ids).to(accumulator(logits.dtype)).masked_fill_(~entries.is_unique, LOG_ZERO)
    logits.scatter_(1, entries.ids, LOG_ZERO)  # what is left in the tile is the rest of the row
    temperature = 1.0 if targets.teacher is None else settings.temperature
    kernels = _row_kernels(logits.device.type, logits.dtype)
    rest = kernels.row_statistics(logits, temperature, z.amax(-1))

    with torch.set_grad_enabled(needs_grad):
        leaves = [z, rest.log_sum_exp] + ([rest.log_sum_exp_t] if temperature != 1.0 else [])
        if needs_grad:
            leaves = [leaf.requires_grad_() for leaf in leaves]
        values = token_losses(z, rest, entries, targets, settings, reference_kl)
        grads = torch.autograd.grad(values.loss.sum(), leaves) if needs_grad else ()
    values = TokenValues(*(value.detach() for value in values))
    if not needs_grad:
        return values

    rest = _rows.RowStatistics(*(statistic.detach() for statistic in rest))
    grad_t = grads[2] / temperature if temperature != 1.0 else None
    scale, softcap = settings.logit_scale, settings.logit_softcap
    kernels.row_gradient_(logits, rest, grads[1], grad_t, temperature, scale, softcap)
    grad_z = grads[0] * scale
    if softcap is not None:
        grad_z = grad_z * (1 - (z.detach() / softcap).square())
    logits.scatter_(1, entries.ids, grad_z.gather(1, entries.slot).to(logits.dtype))
    if reference_gradient is not None:
        logits.add_(reference_gradient)
    return values


@functools.cache
def _row_kernels(device: str, dtype: torch.dtype) -> ModuleType:
    """Triton's where there is a GPU and Triton (which ships with PyTorch for CUDA), else torch's."""
    if device == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("trl_reasoning_distill.losses._triton_rows")
    return _rows


def _full_vocabulary_kl(
    logits: Float[Tensor, "tokens vocab"], targets: TokenTargets, settings: LossSettings, reference: LinearReference
) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, " tokens"]]:
    """KL between student and reference over the vocabulary, and its weighted gradient with respect to the projection."""
    vocab, dtype = logits.shape[1], logits.dtype
    assert targets.reference_hidden is not None
    bias = None if reference.bias is None else reference.bias[:vocab].to(dtype)
    tile = _project(
        targets.reference_hidden.to(dtype),
        reference.weight[:vocab].to(dtype),
        bias,
        reference.logit_scale,
        reference.logit_softcap,
    )
    kl = torch.empty(len(logits), dtype=accumulator(dtype), device=logits.device)
    for rows, z, buffer in _rows.blocks(logits, kl.dtype):
        student, ref = z.log_softmax(-1), buffer.copy_(tile[rows]).log_softmax(-1)
        if settings.kl_direction == "reverse":
            difference = student - ref
            kl[rows] = (student.exp() * difference).sum(-1)
            gradient = student.exp_().mul_(difference.sub_(kl[rows, None]))
        else:
            kl[rows] = (ref.exp() * (ref - student)).sum(-1)
            gradient = student.exp_().sub_(ref.exp_())
        gradient.mul_(targets.kl_weight[rows, None] * settings.logit_scale)
        if settings.logit_softcap is not None:
            gradient.mul_(1 - (z / settings.logit_softcap).square_())
        tile[rows] = gradient
    return tile, kl.clamp_min_(0)


def _no_tokens(hidden: Tensor) -> TokenValues:
    floats = hidden.new_zeros(0, dtype=accumulator(hidden.dtype))
    flags = floats.bool()
    return TokenValues(floats, floats, floats, floats, floats, flags, floats, floats, flags)
