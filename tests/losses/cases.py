"""Random problems for the fused loss, and what the dense reference says about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.reference import dense_loss, logits_of
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import FusedLoss, LinearReference, fused_linear_distillation_loss


@dataclass
class Case:
    """Arguments of `fused_linear_distillation_loss`, in float64 on the CPU."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher: TopKTargets | None
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
            teacher=_to(self.teacher, device),
            reference=_to(self.reference, device),
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
            r = reference
            reference = logits_of(r.hidden, r.weight, r.bias, r.logit_scale, r.logit_softcap)
        elif reference is not None:
            reference = (reference.ids, reference.log_probs)
        parts = dense_loss(
            logits_of(hidden, weight, bias[0] if bias else None, **head),
            self.labels,
            teacher=None if self.teacher is None else (self.teacher.ids, self.teacher.log_probs),
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
    has_teacher = draw(st.booleans())
    return Case(
        hidden=randn(tokens, width),
        weight=randn(vocab, width),
        bias=randn(vocab) if draw(st.booleans()) else None,
        labels=labels,
        teacher=topk_targets(
            2 * randn(tokens, vocab), draw(st.integers(1, vocab)), settings["temperature"], generator, holes=0.2
        )
        if has_teacher
        else None,
        reference=reference,
        weights={
            name: torch.rand(tokens, dtype=torch.float64, generator=generator)
            for name in ("sft_weight", "kd_weight", "kl_weight")
        },
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


def _to(part: Any, device: torch.device | str) -> Any:
    if isinstance(part, TopKTargets):
        return TopKTargets(part.ids.to(device), part.log_probs.to(device))
    if isinstance(part, LinearReference):
        return LinearReference(
            part.hidden.to(device), part.weight.to(device), part.bias, part.logit_scale, part.logit_softcap
        )
    return part
