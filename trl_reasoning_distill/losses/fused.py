"""Language-model head, cross-entropy, Top-K distillation and KL to a reference in one pass over the vocabulary.

The head is where a small model spends its memory: at a vocabulary of 152k, logits of 8k tokens take 2.5 GB in bfloat16.
Here they exist for one chunk of tokens at a time, and the gradient is computed while they do: three matmuls for all terms
together, which is what cross-entropy alone needs. See `docs/concepts/loss.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from trl_reasoning_distill.losses._fused_head import FusedHead
from trl_reasoning_distill.losses._models import LinearModel, LinearReference, LinearTeacher
from trl_reasoning_distill.losses._tiles import DENSE_DIVERGENCES
from trl_reasoning_distill.losses._tokens import LossSettings, TokenTargets, TokenValues
from trl_reasoning_distill.losses.divergence import (
    DivergenceFunction,
    Support,
    TopKTargets,
    accumulator,
    check_divergence,
)
from trl_reasoning_distill.losses.head import Head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["FusedLoss", "LinearReference", "LinearTeacher", "fused_linear_distillation_loss"]

KLDirection = Literal["reverse", "forward"]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class FusedLoss:
    """The loss, and what each token contributed.

    Attributes:
        loss: scalar, with the graph: the weighted sum over supervised tokens, not a mean.
        nll: `(tokens,)`, like all below: detached, and 0 at tokens without a label. Negative log-likelihood in nats.
        kd: divergence to the teacher, times T² if asked for; 0 also at tokens without a target.
        kl: KL to the reference.
        entropy: of the student, at temperature 1.
        is_top1: whether the label is the student's most likely token.
        teacher_mass: what the teacher gives the support, at the temperature.
        student_mass: what the student gives the same tokens, at the temperature.
        top1_agreement: whether the student's and the teacher's most likely tokens are the same (of those that it shares
            with a live teacher).
        mask: whether the token is supervised.
    """

    loss: Float[Tensor, ""]
    nll: Float[Tensor, " tokens"]
    kd: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    is_top1: Bool[Tensor, " tokens"]
    teacher_mass: Float[Tensor, " tokens"]
    student_mass: Float[Tensor, " tokens"]
    top1_agreement: Bool[Tensor, " tokens"]
    mask: Bool[Tensor, " tokens"]


def fused_linear_distillation_loss(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    teacher: TopKTargets | LinearTeacher | None = None,
    reference: LinearReference | TopKTargets | None = None,
    sft_weight: float | Float[Tensor, " tokens"] = 1.0,
    kd_weight: float | Float[Tensor, " tokens"] = 0.0,
    kl_weight: float | Float[Tensor, " tokens"] = 0.0,
    temperature: float = 1.0,
    divergence: str | DivergenceFunction = "forward_kl",
    beta: float = 0.5,
    support: Support = "tail",
    top_p: float = 1.0,
    scale_by_t2: bool = True,
    kl_direction: KLDirection = "reverse",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> FusedLoss:
    """`Σ_t sft_weight_t · nll_t + kd_weight_t · T² · kd_t + kl_weight_t · kl_t` from hidden states, without their logits.

    The logits are `softcap(logit_scale * (hidden @ weight.T + bias))`. Only tokens with a label take part. Gradients
    reach `hidden`, `weight` and `bias` where these require one; a frozen head costs two matmuls instead of three, and
    under `no_grad` there is one. Sums, softmaxes and the head's gradient are accumulated in float32 whatever the inputs
    are; under autocast the matmuls run in its dtype.

    The gradients are computed here and only scaled in the backward pass, so the head's weight is not needed there: a
    weight that was gathered around this call (ZeRO-3) may be released before. A second backward pass through one graph
    is refused by autograd.

    Args:
        hidden: `(tokens, hidden)`, last hidden states; row t predicts `labels[t]` (so already shifted).
        weight: `(vocab, hidden)`, the head; whole, not sharded.
        labels: `(tokens,)`, -100 where unsupervised.
        bias: `(vocab,)`.
        teacher: Top-K targets per token, at `temperature`; tokens without any id carry no distillation loss. Or a live
            teacher, whose logits are made a chunk at a time: its Top-K, or its whole vocabulary.
        reference: the reference policy: hidden states and head for the KL over the whole vocabulary, or its Top-K
            log-probabilities (at temperature 1) for the KL with a tail bucket.
        sft_weight: weight of the negative log-likelihood, one number or one per token. Callers fold in the division by
            the number of tokens in the global batch; the same for the next two.
        kd_weight: weight of the distillation loss.
        kl_weight: weight of the KL to the reference.
        temperature: 0 < T ≤ 100, of the distillation loss only.
        divergence: see `topk_divergence`; so are `beta`, `support` and `top_p`. Or a `DivergenceFunction`, which is
            differentiated by autograd. Over the whole vocabulary of a live teacher, one of `DENSE_DIVERGENCES`.
        beta: interpolation of `"jsd"`.
        support: `"tail"` or `"renormalized"`.
        top_p: adaptive K, of the teacher's own Top-K only.
        scale_by_t2: multiply the distillation loss by T², value and gradient, so that its gradient does not fade with T.
        kl_direction: `"reverse"` is KL(student ‖ reference), `"forward"` KL(reference ‖ student).
        logit_scale: factor on the projection.
        logit_softcap: cap c of `c * tanh(logits / c)`, applied after the scale.
        chunk_size: supervised tokens whose logits exist at a time; chosen by `default_chunk_size` if None.

    Returns:
        The loss with its graph and the detached parts per token. Without any supervised token the loss is a zero whose
        graph reaches all parameters.

    Raises:
        ValueError: for shapes that do not fit, ids outside the vocabulary, a sharded weight, or settings that are out
            of range or refused together.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2, for T²; Wijmans et al. 2024 (arXiv:2411.09009) and
    Hsu et al. 2024 (arXiv:2410.10989) for the head in chunks with the gradient in the forward pass.
    """
    check_divergence("forward_kl" if callable(divergence) else divergence, beta, support, top_p)
    _check_settings(temperature, kl_direction, logit_softcap, chunk_size)
    if isinstance(teacher, LinearTeacher):
        _check_live_teacher(teacher, len(weight), divergence, top_p)
    _check_shapes(hidden, weight, labels, bias, teacher, reference)
    weights = {"sft_weight": sft_weight, "kd_weight": kd_weight, "kl_weight": kl_weight}
    token_weights = {name: _per_token(name, value, hidden) for name, value in weights.items()}

    mask = labels != IGNORED_LABEL
    index = mask.nonzero()[:, 0]
    hidden = _compute_dtype(hidden).index_select(0, index)
    live = teacher if isinstance(teacher, LinearTeacher) else None
    linear = reference if isinstance(reference, LinearReference) else None
    targets = TokenTargets(
        labels=labels[index].long(),
        teacher=teacher[index].truncated(top_p) if isinstance(teacher, TopKTargets) else None,
        reference=reference[index].truncated(1.0) if isinstance(reference, TopKTargets) else None,
        teacher_hidden=None if live is None else _compute_dtype(live.hidden.detach())[index],
        reference_hidden=None if linear is None else _compute_dtype(linear.hidden.detach())[index],
        **{name: value[index] for name, value in token_weights.items()},
    )
    vocab = len(weight)
    _check_ids(targets, vocab)
    shared_ids = vocab if live is None else live.shared_ids(vocab)
    needs_head_grad = torch.is_grad_enabled() and weight.requires_grad
    settings = LossSettings(
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        support=support,
        top_p=top_p,
        scale_by_t2=scale_by_t2,
        kl_direction=kl_direction,
        chunk_size=chunk_size or default_chunk_size(hidden, needs_head_grad),
        needs_grad=torch.is_grad_enabled(),
        reference_head=_cut_head(linear, targets.reference_hidden, vocab),
        teacher_head=_cut_head(live, targets.teacher_hidden, shared_ids),
        top_k=None if live is None else live.top_k,
        on="teacher" if live is None else live.on,
        shared_ids=None if live is None or live.top_k is None else shared_ids,
    )
    loss, *values = FusedHead.apply(hidden, weight, bias, logit_scale, logit_softcap, targets, settings)
    values = (value.new_zeros(mask.shape).index_put_((index,), value) for value in values)
    return FusedLoss(loss=loss, mask=mask, **dict(zip(TokenValues._fields[1:], values, strict=True)))


def default_chunk_size(hidden: Float[Tensor, "tokens hidden"], needs_head_grad: bool) -> int:
    """Supervised tokens per chunk: few enough to be lean, enough to keep the matmuls fast.

    A small chunk costs nothing where the head's gradient is not needed, or is summed in place (float32). In bfloat16
    the sum is a float32 tensor of its own, and each chunk adds a pass over it. So one chunk does without it while its
    logits are no larger (2 * hidden tokens); beyond, the matmuls of `hidden` tokens per chunk hide the pass.
    """
    tokens, width = hidden.shape
    chunk = 256 if hidden.device.type == "cpu" else 2048
    if needs_head_grad and hidden.dtype != accumulator(hidden.dtype):
        chunk = tokens if tokens <= 2 * width else max(chunk, width)
    chunks = max(1, -(-tokens // max(1, chunk)))
    return max(1, -(-tokens // chunks))


def _compute_dtype(hidden: Tensor) -> Tensor:
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _cut_head(model: LinearModel | None, hidden: Tensor | None, vocab: int) -> Head | None:
    return None if model is None or hidden is None else model.head.first(vocab, hidden.dtype)


def _per_token(name: str, value: float | Tensor, hidden: Tensor) -> Float[Tensor, " tokens"]:
    if isinstance(value, Tensor) and value.ndim and value.shape != hidden.shape[:1]:
        raise ValueError(f"`{name}` must be a number or of shape ({len(hidden)},), but has shape {tuple(value.shape)}.")
    return torch.as_tensor(value, dtype=accumulator(hidden.dtype), device=hidden.device).detach().expand(len(hidden))


def _check_settings(temperature: float, kl_direction: str, logit_softcap: float | None, chunk_size: int | None) -> None:
    if not 0 < temperature <= 100:  # beyond, `LOG_ZERO / temperature` is no longer a log of zero
        raise ValueError(f"`temperature` must be above 0 and at most 100, but is {temperature}.")
    if kl_direction not in get_args(KLDirection):
        raise ValueError(f"`kl_direction` must be one of {', '.join(get_args(KLDirection))}, but is {kl_direction!r}.")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"`logit_softcap` must be above 0, or None for no cap, but is {logit_softcap}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, or None to have it chosen, but is {chunk_size}.")


def _check_live_teacher(teacher: LinearTeacher, vocab: int, divergence: Any, top_p: float) -> None:
    shared = teacher.shared_ids(vocab)
    if not 1 <= shared <= min(vocab, len(teacher.weight)):
        raise ValueError(
            f"`teacher.vocab_size` is {shared}, but the teacher's head knows {len(teacher.weight)} tokens and the "
            f"student's {vocab}: it must be between 1 and the smaller of the two."
        )
    if teacher.top_k is not None and teacher.top_k < 1:
        raise ValueError(
            f"`teacher.top_k` must be at least 1, or None for the whole vocabulary, but is {teacher.top_k}."
        )
    if teacher.on not in ("teacher", "student"):
        raise ValueError(f"`teacher.on` must be 'teacher' or 'student', but is {teacher.on!r}.")
    if teacher.top_k is None and divergence not in DENSE_DIVERGENCES:
        raise ValueError(
            f"Over the whole vocabulary (`teacher.top_k=None`) `divergence` must be one of {', '.join(DENSE_DIVERGENCES)}; "
            "any other needs a support: set `teacher.top_k`."
        )
    if top_p < 1.0 and (teacher.top_k is None or teacher.on == "student"):
        raise ValueError(
            f"`top_p={top_p}` keeps the most likely of the teacher's Top-K tokens, so it needs `teacher.top_k` and "
            "`teacher.on='teacher'`."
        )


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    teacher: TopKTargets | LinearTeacher | None,
    reference: LinearReference | TopKTargets | None,
) -> None:
    _check_head("", hidden, weight, bias)
    per_token = {"labels": labels}
    for name, part in (("teacher", teacher), ("reference", reference)):
        if isinstance(part, TopKTargets):
            per_token[f"{name}.ids"] = part.ids
        elif part is not None:
            _check_head(f"{name}.", part.hidden, part.weight, part.bias)
            per_token[f"{name}.hidden"] = part.hidden
    if isinstance(reference, LinearReference) and len(reference.weight) < len(weight):
        raise ValueError(
            f"The reference's head knows {len(reference.weight)} tokens and the student's {len(weight)}: a "
            "full-vocabulary KL needs at least as many. Pass the reference as `TopKTargets` instead."
        )
    for name, tensor in per_token.items():
        if len(tensor) != len(hidden):
            raise ValueError(f"`{name}` has {len(tensor)} tokens, but `hidden` has {len(hidden)}.")


def _check_head(owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"`{owner}weight` is a sharded DTensor; pass `{owner}weight.full_tensor()`.")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`{owner}hidden` and `{owner}weight` must be (tokens, hidden) and (vocab, hidden), but have the shapes "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`{owner}bias` must be of shape ({len(weight)},), but has shape {tuple(bias.shape)}.")


def _check_ids(targets: TokenTargets, vocab: int) -> None:
    ids = {"labels": targets.labels, "teacher.ids": None, "reference.ids": None}
    if targets.teacher is not None:
        ids["teacher.ids"] = targets.teacher.ids
    if targets.reference is not None:
        ids["reference.ids"] = targets.reference.ids
    for name, tensor in ids.items():
        if tensor is None or not tensor.numel():
            continue
        if tensor.device.type == "cuda":  # asserted there, as cross-entropy does: looking would make the host wait
            is_valid = (tensor < vocab) & (tensor >= 0) if name == "labels" else tensor < vocab
            torch._assert_async(is_valid.all(), f"`{name}` holds an id that the head, of {vocab} tokens, does not know")
            continue
        largest = int(tensor.max())
        if largest >= vocab:
            raise ValueError(
                f"`{name}` holds the id {largest}, but the head knows {vocab} tokens. Were the targets made "
                "for another vocabulary? Align them to the student's first."
            )
        if name == "labels" and int(tensor.min()) < 0:
            raise ValueError(
                f"`labels` holds {int(tensor.min())}, which is no token. Only {IGNORED_LABEL} marks a position that is not supervised."
            )
