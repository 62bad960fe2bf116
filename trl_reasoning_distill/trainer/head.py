"""A forward that ends in a loss instead of logits.

`add_head_loss(model)` lets the model be called as `model(**inputs, head_loss=f)`: the backbone runs, the LM head's weight is
gathered, and `f(hidden, head)` computes the loss from them. It all happens inside the forward of the *wrapped* model, so the hooks of
DDP, FSDP2 and ZeRO fire; and `f` is opaque to them, so none of them casts or scatters the float32 targets it has closed over.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import FusedLoss, LinearTeacher
from trl_reasoning_distill.losses.head import Head, body_of
from trl_reasoning_distill.trainer.reference import Reference
from trl_reasoning_distill.trainer.trl_bridge import gathered_head, load_balancing_loss


class HeadLoss(Protocol):
    """Computes the loss of a batch from the last hidden states `(batch, length, h)` and the head, the student's and the reference's."""

    def __call__(
        self, hidden: Tensor, head: Head, reference_hidden: Tensor | None, reference_head: Head | None
    ) -> FusedLoss: ...


@dataclass(frozen=True)
class LossBatch:
    """One micro-batch as the loss sees it: flat over its `tokens`, each at the position that predicts it.

    Attributes:
        labels: `(tokens,)`, −100 where there is nothing to learn.
        columns: Per-token columns by name, `(tokens, …)`.
        scale: What each token's loss is multiplied by so that, summed over micro-batches and averaged over ranks as DDP does, the
            global batch's loss is divided once by its supervised tokens.
        step: Optimizer steps done so far.
        is_training: False in evaluation.
        teacher: Distributions of a live teacher for these tokens; `None` without one.
    """

    labels: Tensor
    columns: Mapping[str, Tensor]
    scale: Tensor
    step: int
    is_training: bool
    teacher: LinearTeacher | TopKTargets | None = None


@dataclass
class HeadLossOutput(ModelOutput):
    """What a model with a head loss returns.

    Args:
        objective: The loss, a scalar with the graph.
        per_token: The `FusedLoss`, whose per-token fields are detached.
        aux_loss: Load-balancing loss of a mixture of experts, unweighted; `None` unless router logits were asked for.
    """

    objective: Tensor
    per_token: FusedLoss | None = None  # always set; ModelOutput allows one required field
    aux_loss: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The same under the name that models use. A copy: PEFT's AdaLoRA adds a term of its own to it, in place, which TRL does not train."""
        return self.objective.clone()

    @loss.setter
    def loss(self, value: Tensor) -> None:
        """As PEFT's AdaLoRA assigns it; the trainer takes `objective`."""


def bound_to(model: PreTrainedModel, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that was found on a model, for that model or a deep copy of it, which must compute with its own weights."""
    function = getattr(forward, "__func__", None)  # accelerate's hooks leave a function that knows its module
    return forward if function is None else types.MethodType(function, model)


def add_head_loss(model: PreTrainedModel) -> None:
    """Let `model` be called with `head_loss=`; without it, its forward is what it was.

    Args:
        model: A causal language model, before DDP, FSDP2 or DeepSpeed wrap it; under PEFT, the base model.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # bitsandbytes 0.50 on a CPU packs a 4-bit weight at the first forward in evaluation, for good, and no gradient gets past it after
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    forward = model.forward

    # `generate` validates its arguments against the signature, so the signature stays
    @functools.wraps(type(model).forward)
    def forward_with_loss(
        self: PreTrainedModel,
        *args: Any,
        head_loss: HeadLoss | None = None,
        reference: Reference | None = None,
        **kwargs: Any,
    ) -> Any:
        if head_loss is None:
            return bound_to(self, forward)(*args, **kwargs)
        kwargs["use_cache"] = False
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # The reference first: it leaves one hidden state per token, the student a graph full of activations
        reference_hidden = None if reference is None else reference.hidden(self, *args, **kwargs)
        # Looked up on each call, since FSDP and PEFT replace modules after this
        outputs = body_of(self)(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            head = stack.enter_context(gathered_head(self))
            reference_head = None
            if reference is not None:
                reference_head = stack.enter_context(gathered_head(self, reference.output_layer(self)))
            # With the model split across devices, the backbone can end on another device than the head
            hidden = outputs.last_hidden_state.to(head.weight.device)
            per_token = head_loss(hidden, head, reference_hidden, reference_head)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = load_balancing_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        return HeadLossOutput(objective=per_token.loss, per_token=per_token, aux_loss=aux_loss)

    model.forward = types.MethodType(forward_with_loss, model)


_MEANS = {
    "kd_loss": "kd",
    "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
    "top1_agreement": "agreement",
}


def distillation_sums(outputs: FusedLoss) -> dict[str, Tensor]:
    """Sums over this rank's tokens that the metrics are made of; each scalar."""
    return {
        "targets": (outputs.teacher_mass > 0).sum(),
        "kd": outputs.kd.sum(),
        "teacher_mass": outputs.teacher_mass.sum(),
        "student_mass": outputs.student_mass.sum(),
        "agreement": outputs.top1_agreement.sum(),
    }


def distillation_means(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics from these sums over all ranks: per token with a target; nothing where there is none."""
    return {name: sums[key] / sums["targets"] for name, key in _MEANS.items()} if sums["targets"] else {}
