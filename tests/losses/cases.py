"""Random problems for the fused loss, and what the dense reference says about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.reference import dense_loss, logits_of
from trl_reasoning_distill.losses._models import LinearModel
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import (
    FusedLoss,
    LinearReference,
    LinearTeacher,
    fused_linear_distillation_loss,
)

WEIGHTS = ("sft_weight", "kd_weight", "kl_weight")


@dataclass
class Case:
    """Arguments of `fused_linear_distillation_loss`, in float64 on the CPU."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher: TopKTargets | LinearTeacher | None
    reference: LinearReference | TopKTargets | None
    weights: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    @property
    def has_resolvable_tails(self) -> bool:
        """Whether float32 can know the tails: of `1 - mass` it sees 1e-7, and reverse KL takes the logarithm."""
        for topk in (self.teacher, self.reference):
            if isinstance(topk, TopKTargets):
                present = topk.ids >= 0
                tail = 1 - (topk.log_probs.exp() * present).sum(-1)
                if ((tail < 1e-3) & (present.sum(-1) < len(self.weight))).any():
                    return False
        return True

    def run(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[FusedLoss, list[Tensor]]:
        """The fused loss and its gradients of hidden, weight and bias."""
        hidden, weight, *bias = leaves = [
            parameter.detach().to(device, dtype).requires_grad_() for parameter in self.parameters
        ]
        out = fused_linear_distillation_loss(
            hidden,
            weight,
            self.labels.to(device),
            bias=bias[0] if bias else None,
            teacher=to(self.teacher, device, dtype),
            reference=to(self.reference, device, dtype),
            **{name: value.to(device) for name, value in self.weights.items()},
            **self.settings,
        )
        return out, list(torch.autograd.grad(out.loss, leaves))

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The same from the dense float64 reference, at parameters that were rounded to `dtype`."""
        hidden, weight, *bias = leaves = [
            parameter.detach().to(dtype).double().requires_grad_() for parameter in self.parameters
        ]
        settings = dict(self.settings)
        settings.pop("chunk_size", None)
        head = {"scale": settings.pop("logit_scale", 1.0), "softcap": settings.pop("logit_softcap", None)}
        reference = self.reference
        if isinstance(reference, LinearReference):
            reference = _logits_of_model(reference, dtype)
        elif reference is not None:
            reference = (reference.ids, reference.log_probs)
        teacher = {}
        if isinstance(self.teacher, LinearTeacher):
            live = self.teacher
            how = {"vocab_size": live.shared_ids(len(weight)), "top_k": live.top_k, "on": live.on}
            teacher["live"] = (_logits_of_model(live, dtype), how)
        elif self.teacher is not None:
            teacher["teacher"] = (self.teacher.ids, self.teacher.log_probs)
        parts = dense_loss(
            logits_of(hidden, weight, bias[0] if bias else None, **head),
            self.labels,
            **teacher,
            reference=reference,
            **self.weights,
            **settings,
        )
        grads = torch.autograd.grad(parts["loss"], leaves, allow_unused=True, materialize_grads=True)
        return {name: part.detach() for name, part in parts.items()}, list(grads)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = (actual.detach().cpu().double() - expected).norm()
    return float(difference / expected.norm()) if expected.norm() > 0 else float(difference)


def problem(tokens: int = 6, width: int = 4, vocab: int = 11, k: int = 3, **settings: Any) -> Case:
    """A fixed problem with every term in it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[1] = -100
    return Case(
        hidden=randn(tokens, width),
        weight=randn(vocab, width),
        bias=randn(vocab),
        labels=labels,
        teacher=topk_targets(randn(tokens, vocab), k, settings.get("temperature", 1.0)),
        reference=LinearReference(randn(tokens, 2), randn(vocab, 2)),
        weights={name: torch.rand(tokens, dtype=torch.float64, generator=generator) for name in WEIGHTS},
        settings=settings,
    )


def live_teacher(tokens: int = 6, vocab: int = 11, **settings: Any) -> LinearTeacher:
    """A live teacher for `problem`, with rows of its own beyond the nine shared ids."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab + 2, 3, dtype=torch.float64, generator=generator)
    return LinearTeacher(hidden, weight, **{"vocab_size": vocab - 2} | settings)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small problems of every kind: K up to V, holes in targets and labels, all settings."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, width, vocab = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(2, 40))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = -100
    divergence = draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"]))
    settings = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0])),
        "divergence": divergence,
        "beta": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "support": draw(st.sampled_from(["tail", "renormalized"])) if divergence == "forward_kl" else "tail",
        "top_p": draw(st.sampled_from([0.3, 0.8, 1.0])),
        "scale_by_t2": draw(st.booleans()),
        "kl_direction": draw(st.sampled_from(["forward", "reverse"])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "logit_softcap": draw(st.sampled_from([None, 3.0, 30.0])),
        "chunk_size": draw(st.sampled_from([None, 1, 2, 4])),
    }
    reference: LinearReference | TopKTargets | None = None
    kind = draw(st.sampled_from(["none", "linear", "topk"]))
    if kind == "linear":
        padding = draw(st.integers(0, 3))
        reference = LinearReference(randn(tokens, 3), randn(vocab + padding, 3), logit_scale=0.7, logit_softcap=5.0)
    elif kind == "topk":
        reference = topk_targets(randn(tokens, vocab), draw(st.integers(1, vocab)), 1.0, generator, holes=0.2)
    teacher: TopKTargets | LinearTeacher | None = None
    kind = draw(st.sampled_from(["none", "topk", "live", "live"]))
    if kind == "topk":
        temperature = settings["temperature"]
        teacher = topk_targets(2 * randn(tokens, vocab), draw(st.integers(1, vocab)), temperature, generator, holes=0.2)
    elif kind == "live":
        known = draw(st.integers(1, vocab + 5))
        teacher = LinearTeacher(
            randn(tokens, 3),
            randn(known, 3),
            randn(known) if draw(st.booleans()) else None,
            logit_scale=draw(st.sampled_from([1.0, 1.5])),
            logit_softcap=draw(st.sampled_from([None, 5.0])),
            vocab_size=draw(st.sampled_from([None, draw(st.integers(1, min(known, vocab)))])),
            top_k=draw(st.one_of(st.none(), st.integers(1, vocab + 2))),
            on=draw(st.sampled_from(["teacher", "student"])),
        )
        if teacher.top_k is None or teacher.on == "student":
            settings["top_p"] = 1.0
    return Case(
        hidden=randn(tokens, width),
        weight=randn(vocab, width),
        bias=randn(vocab) if draw(st.booleans()) else None,
        labels=labels,
        teacher=teacher,
        reference=reference,
        weights={name: torch.rand(tokens, dtype=torch.float64, generator=generator) for name in WEIGHTS},
        settings=settings,
    )


def topk_targets(
    logits: Tensor, k: int, temperature: float, generator: torch.Generator | None = None, holes: float = 0.0
) -> TopKTargets:
    """The Top-K of a teacher; of its ids, and of whole rows, a share `holes` is missing."""
    log_probs, ids = torch.log_softmax(logits / temperature, -1).topk(k)
    if holes:
        missing = torch.rand(ids.shape, generator=generator) < holes
        missing |= torch.rand(len(ids), 1, generator=generator) < holes
        ids = ids.masked_fill(missing, -1)
    return TopKTargets(ids, log_probs)


def to(part: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A teacher or reference on a device; models in a dtype too."""
    if isinstance(part, TopKTargets):
        return TopKTargets(part.ids.to(device), part.log_probs.to(device))
    if isinstance(part, LinearModel):
        bias = None if part.bias is None else part.bias.to(device, dtype)
        return replace(part, hidden=part.hidden.to(device, dtype), weight=part.weight.to(device, dtype), bias=bias)
    return part


def _logits_of_model(model: LinearModel, dtype: torch.dtype) -> Tensor:
    bias = None if model.bias is None else model.bias.to(dtype)
    return logits_of(model.hidden.to(dtype), model.weight.to(dtype), bias, model.logit_scale, model.logit_softcap)
