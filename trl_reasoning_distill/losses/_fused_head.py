"""The language-model head and all terms of the loss, a chunk of tokens at a time, with the gradient in the forward pass.

What the loss is stands in `_tokens`, what it costs stands here: per chunk one tile of logits, which turn into their own
gradient in place, and three matmuls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_reasoning_distill.losses import _kernels, _rows, _tiles
from trl_reasoning_distill.losses._matmul import add_product_
from trl_reasoning_distill.losses._tiles import top_k_targets
from trl_reasoning_distill.losses._tokens import (
    DenseTerms,
    Entries,
    LossSettings,
    TokenTargets,
    TokenValues,
    differentiated,
    token_losses,
)
from trl_reasoning_distill.losses.divergence import LOG_ZERO, accumulator
from trl_reasoning_distill.losses.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float

# A probability of 2e-10 is still seen in float16 (6e-8 / 256), and the head's weights may add up to 256 before it overflows.
_FLOAT16_HEADROOM = 8
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
        unit = _float16_unit(targets) if hidden.dtype == torch.float16 else None
        with torch.autocast(hidden.device.type, enabled=False):
            student = Head(weight, bias, logit_scale, logit_softcap)
            in_units = targets if unit is None else targets.weighted(1 / unit)
            values, grads = _run(hidden, student, in_units, settings, needs_grad)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        loss = values.loss.sum()
        if unit is None:
            grads = _cast(grads, ctx.dtypes)
        else:
            loss = loss * unit
        ctx.unit = unit
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*values[1:])
        return loss, *values[1:]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The fused loss has no second derivative: its gradient is computed in the forward pass. Leave out `create_graph=True`."
            )
        grads, unit = list(ctx.saved_tensors), ctx.unit
        for grad in grads:
            if grad is not None:
                # By this autograd refuses a second backward pass, whether the gradients change below or not.
                torch.autograd.graph.increment_version(grad)
        if unit is not None:
            # In float32: the factor alone may be too small for 16 bits.
            factor = grad_loss.float() * unit
            grads = _cast([None if grad is None else grad.float().mul_(factor) for grad in grads], ctx.dtypes)
        elif grad_loss.device.type != "cpu" or grad_loss != 1:  # looking would make an accelerator wait
            # In place: a second copy of the head's gradient would be the largest tensor of the step.
            grads = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return *grads, None, None, None, None


def _cast(grads: list[Tensor | None], dtypes: list[torch.dtype]) -> list[Tensor | None]:
    return [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _float16_unit(targets: TokenTargets) -> Tensor:
    """What the tokens' weights are counted in: the largest of them, rounded up to a power of two, and 256 times less than that.

    A weight holds the division by the tokens of the global batch. Probabilities times such a weight vanish in float16;
    times this unit they come back in float32, together with the gradient scaler's factor.
    """
    weights = torch.stack([targets.sft_weight, targets.kd_weight, targets.kl_weight])
    largest = weights.abs().amax() if weights.numel() else weights.new_ones(())
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - _FLOAT16_HEADROOM)


def _run(
    hidden: Float[Tensor, "tokens hidden"],
    student: Head,
    targets: TokenTargets,
    settings: LossSettings,
    needs_grad: list[bool],
) -> tuple[TokenValues, list[Tensor | None]]:
    """Walk over chunks of tokens; gradients are in the dtype they were summed in, None where not needed."""
    weight, bias = student.weight, student.bias
    dtype = hidden.dtype
    student = student.first(len(weight), dtype)
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = _WeightGradient(weight, one_chunk=len(hidden) <= settings.chunk_size) if needs_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=accumulator(dtype)) if needs_grad[2] and bias is not None else None
    values: list[TokenValues] = []
    # A live teacher's Top-K comes with its tile; what is named by stored targets is sorted once for all chunks.
    entries = None if settings.top_k is not None else Entries.of(targets)
    for start in range(0, len(hidden), settings.chunk_size):
        rows = slice(start, start + settings.chunk_size)
        named = None if entries is None else entries.of_tokens(rows)
        grad_logits = _chunk(hidden[rows], targets[rows], named, student, settings, any(needs_grad), values)
        if grad_logits is None:
            continue
        if grad_hidden is not None:
            torch.mm(grad_logits, student.weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.add(grad_logits, hidden[rows])
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
        del grad_logits  # before the next tile is made
    if not values:
        values.append(_no_tokens(hidden))
    return TokenValues(*(torch.cat(parts) for parts in zip(*values, strict=True))), [
        grad_hidden,
        None if grad_weight is None else grad_weight.result(),
        grad_bias,
    ]


def _chunk(
    hidden: Float[Tensor, "tokens hidden"],
    targets: TokenTargets,
    entries: Entries | None,
    student: Head,
    settings: LossSettings,
    needs_grad: bool,
    values: list[TokenValues],
) -> Float[Tensor, "tokens vocab"] | None:
    """The gradient with respect to the projection of a chunk of tokens, in the dtype of the matmuls, or None where none is needed.

    Appends to `values`. Where a second model's logits stand beside the student's, they do for some of the tokens at a time.
    """
    tokens, tile = len(hidden), len(hidden)
    if settings.teacher_head is not None or settings.reference_head is not None:
        tile = _CPU_SECOND_TILE if hidden.device.type == "cpu" else _ACCELERATOR_SECOND_TILE
    parts = [slice(first, first + tile) for first in range(0, tokens, tile)]

    def losses_(logits: Tensor, part: slice) -> TokenValues:
        named = None if entries is None else entries.of_tokens(part)
        return _losses_and_gradient_(logits, hidden[part], targets[part], named, student, settings, needs_grad)

    if not settings.in_float32 or hidden.dtype == accumulator(hidden.dtype):
        logits = student.logits(hidden)
        values += [losses_(logits[part], part) for part in parts]
        return logits if needs_grad else None
    gradient = hidden.new_empty(tokens, len(student.weight)) if needs_grad else None
    for part in parts:
        logits = student.logits(hidden[part], in_float32=True)
        values.append(losses_(logits, part))
        if gradient is not None:
            gradient[part] = logits
        del logits
    return gradient


class _WeightGradient:
    """The sum of the chunks' gradients of the head: in float32, unless there is only one and it fits in its dtype."""

    def __init__(self, weight: Tensor, one_chunk: bool) -> None:
        self.weight, self.one_chunk = weight, one_chunk
        self.total: Tensor | None = None

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        dtype = grad_logits.dtype
        if self.total is None:
            # The sum over the tokens of a chunk is in range for bfloat16, and need not be for float16.
            if dtype == accumulator(dtype) or (self.one_chunk and dtype != torch.float16):
                self.total = torch.mm(grad_logits.t(), hidden)
                return
            self.total = torch.zeros_like(self.weight, dtype=accumulator(dtype))
        if self.total.dtype == dtype:
            self.total.addmm_(grad_logits.t(), hidden)
        else:
            add_product_(self.total, grad_logits.t(), hidden)

    def result(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.total is None else self.total


def _losses_and_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    hidden: Float[Tensor, "tokens hidden"],
    targets: TokenTargets,
    entries: Entries | None,
    student: Head,
    settings: LossSettings,
    needs_grad: bool,
) -> TokenValues:
    """The values of some tokens; `logits` become the gradient with respect to the projection, or are spoilt."""
    targets, dense, dense_gradients = _second_models(logits, targets, student, settings, needs_grad)
    entries = Entries.of(targets) if entries is None else entries
    tokens = torch.arange(len(logits), device=logits.device)[:, None]
    z = student.named_logits(logits, hidden, entries.ids).masked_fill_(~entries.is_unique, LOG_ZERO)
    z.clamp_min_(LOG_ZERO)  # a bias of -inf takes a token out of the vocabulary
    # What is left in the tile is the rest of the row. (Not `scatter_`: on the CPU it goes through a float32 copy of it all.)
    logits[tokens, entries.ids] = LOG_ZERO
    temperature = 1.0 if targets.teacher is None else settings.temperature
    where = logits.device.type, logits.dtype
    kernels: Any = _kernels.kernels("rows", *where) or _rows
    # The ids that a live teacher shares, and those that only the likelihood knows.
    parts = logits.tensor_split([settings.shared_ids or logits.shape[1]], dim=1)
    temperatures = (temperature, 1.0)
    rows = [
        kernels.row_statistics(part, t, z.amax(-1)) for part, t in zip(parts, temperatures, strict=True) if part.numel()
    ]

    padding = rows[1] if len(rows) > 1 else None
    token_kernels: Any = _kernels.kernels("tokens", *where)
    if token_kernels is not None and token_kernels.is_covered(targets, padding, settings, dense):
        values, grads = token_kernels.token_losses(z, rows[0], entries, targets, settings)
    elif needs_grad:
        values, grads = differentiated(z, rows[0], padding, entries, targets, settings, dense)
    else:
        values = token_losses(z, rows[0], padding, entries, targets, settings, dense)
    if not needs_grad:
        return values

    grads_t = (None if grads.log_sum_exp_t is None else grads.log_sum_exp_t / temperature, None)
    head = (student.logit_scale, student.logit_softcap)
    for part, row, grad, grad_t, t in zip(parts, rows, grads.log_sum_exps, grads_t, temperatures, strict=False):
        kernels.row_gradient_(part, row, grad, grad_t, t, *head)
    grad_z = grads.z * student.slope(z)
    logits[tokens, entries.ids] = grad_z.gather(1, entries.slot).to(logits.dtype)
    for gradient in dense_gradients:
        logits[:, : gradient.shape[1]].add_(gradient)
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
    kernels: Any = _kernels.kernels("tiles", logits.device.type, logits.dtype) or _tiles
    head = (student.logit_scale, student.logit_softcap)
    if settings.reference_head is not None and targets.reference_hidden is not None:
        tile = settings.reference_head.logits(targets.reference_hidden, in_float32=True)
        direction = "forward_kl" if settings.kl_direction == "forward" else "reverse_kl"
        weight = targets.kl_weight if needs_grad else None
        kl, _ = kernels.dense_divergence_(tile, logits, weight, direction, 0.0, 1.0, *head)
        terms = terms._replace(kl=kl)
        gradients.append(tile)
    teacher, teacher_hidden = settings.teacher_head, targets.teacher_hidden
    if teacher is not None and teacher_hidden is not None:
        tile = teacher.logits(teacher_hidden, in_float32=settings.top_k is None)
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
            kd, agrees = kernels.dense_divergence_(
                tile, shared, weight, settings.divergence, settings.beta, temperature, *head
            )
            terms = terms._replace(kd=kd * factor)
            gradients.append(tile)
        terms = terms._replace(top1_agreement=agrees)
    return targets, terms, gradients


def _no_tokens(hidden: Tensor) -> TokenValues:
    floats = hidden.new_zeros(0, dtype=accumulator(hidden.dtype))
    flags = floats.bool()
    return TokenValues(floats, floats, floats, floats, floats, flags, floats, floats, flags)
