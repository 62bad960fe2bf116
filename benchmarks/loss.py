"""The head's loss, forward and backward, beside what a user would pick instead.

    python benchmarks/loss.py --dtype bfloat16 --output benchmarks/results/loss-bf16      # shapes of Qwen2.5-0.5B, minutes
    python benchmarks/loss.py --quick --json

Every case starts from hidden states and a head that require gradients, and ends with the gradients of both.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from harness import Goal, Run, Suite, UnavailableError
from torch import Tensor

from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearTeacher, fused_linear_distillation_loss

Inputs = dict[str, Any]


def make_inputs(options: argparse.Namespace, small: bool, live: bool = False) -> Inputs:
    """What the cases of one process share, see `_shared_inputs`."""
    tokens, vocab = (8, 1000) if small else (options.tokens, options.vocab)
    return _shared_inputs(tokens, options.hidden, vocab, options.k, options.dtype, options.device, live)


@functools.cache
def _shared_inputs(tokens: int, width: int, vocab: int, k: int, dtype_name: str, device: str, live: bool) -> Inputs:
    """Hidden states, a head, labels and Top-K targets; `live` adds a teacher's hidden states and head."""
    dtype = getattr(torch, dtype_name)
    if live:
        inputs = _shared_inputs(tokens, width, vocab, k, dtype_name, device, False)
        teacher_hidden = torch.randn(tokens, width, device=device, dtype=dtype)
        teacher_weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(0.05)
        return inputs | {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).mul_(scale)

    # Distinct ids, spread over the vocabulary. (Permutations would leave the heap larger than what is measured.)
    first, step = torch.randint(vocab, (tokens, 1), device=device), vocab // k
    ids = (first + step * torch.arange(k, device=device)) % vocab
    log_probs = torch.log_softmax(torch.randn(tokens, k + 1, device=device).mul_(2), -1)
    return {
        "hidden": randn(tokens, width).requires_grad_(),
        "weight": randn(vocab, width, scale=0.05).requires_grad_(),
        "labels": torch.randint(0, vocab, (tokens,), device=device),
        "teacher": TopKTargets(ids, log_probs[:, :-1].sort(descending=True).values),
    }


def case(
    loss: Callable[..., Tensor], live: bool = False, **arguments: Any
) -> Callable[[argparse.Namespace, bool], Run]:
    """A case from a function of the inputs that returns a scalar."""

    def prepare(options: argparse.Namespace, small: bool) -> Run:
        inputs = make_inputs(options, small, live)

        def run() -> None:
            loss(inputs, **arguments).backward()
            inputs["hidden"].grad = inputs["weight"].grad = None

        return run

    return prepare


def floor(options: argparse.Namespace, small: bool) -> Run:
    """Three matmuls and nothing else: what no exact head can beat."""
    inputs = make_inputs(options, small)
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()

    def run() -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden

    return run


def cross_entropy(inputs: Inputs) -> Tensor:
    """As Hugging Face models do it: all logits, in float32."""
    return F.cross_entropy((inputs["hidden"] @ inputs["weight"].t()).float(), inputs["labels"])


def textbook(inputs: Inputs, temperature: float = 1.0) -> Tensor:
    """Cross-entropy plus forward KL on K + 1 buckets, from all logits, with autograd."""
    logits = (inputs["hidden"] @ inputs["weight"].t()).float()
    teacher = inputs["teacher"]
    student = torch.log_softmax(logits / temperature, -1).gather(-1, teacher.ids)
    tails = [torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (teacher.log_probs, student)]
    kl = (teacher.log_probs.exp() * (teacher.log_probs - student)).sum(-1) + tails[0].exp() * (tails[0] - tails[1])
    return F.cross_entropy(logits, inputs["labels"]) + 0.35 * temperature**2 * kl.mean()


def trl_fused_sft(inputs: Inputs) -> Tensor:
    """The head that TRL's SFTTrainer patches in, with its metrics."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    outputs = ("entropy", "is_top1")
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0].mean()


def trl_chunked_divergence(inputs: Inputs) -> Tensor:
    """TRL's full-vocabulary forward KL from hidden states of student and teacher."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (inputs["hidden"], inputs["weight"]), (inputs["teacher_hidden"], inputs["teacher_weight"])
    return ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 0.0)[0].mean()


def trl_gkd(inputs: Inputs, beta: float) -> Tensor:
    """The loss of TRL's GKDTrainer: both models' full logits."""
    from trl.experimental.gkd import GKDTrainer

    student = inputs["hidden"] @ inputs["weight"].t()
    with torch.no_grad():
        teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"].t()
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], inputs["labels"][None], beta=beta)


def liger_jsd(options: argparse.Namespace, small: bool) -> Run:
    """Liger's fused linear JSD, where it is installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise UnavailableError("liger-kernel is not installed") from error
    loss = LigerFusedLinearJSDLoss()
    return case(
        lambda inputs: loss(
            inputs["hidden"], inputs["weight"], inputs["teacher_hidden"], inputs["teacher_weight"], inputs["labels"]
        ),
        live=True,
    )(options, small)


def liger_cross_entropy(options: argparse.Namespace, small: bool) -> Run:
    """Liger's fused linear cross-entropy, where it is installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise UnavailableError("liger-kernel is not installed") from error
    if options.device == "cpu":
        raise UnavailableError("its kernels need a GPU")
    loss = LigerFusedLinearCrossEntropyLoss()
    return case(lambda inputs: loss(inputs["weight"], inputs["hidden"], inputs["labels"]))(options, small)


def cut_cross_entropy(options: argparse.Namespace, small: bool) -> Run:
    """Apple's cut-cross-entropy, where it is installed."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError("cut-cross-entropy is not installed") from error
    if options.device == "cpu":
        raise UnavailableError("its kernels need a GPU")
    return case(lambda inputs: linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["labels"]))(
        options, small
    )


def ours(inputs: Inputs, kd: bool = True, masked: bool = False, frozen: bool = False, **arguments: Any) -> Tensor:
    """This package: SFT, or SFT and Top-K distillation."""
    labels, tokens = inputs["labels"].clone(), len(inputs["labels"])
    if masked:
        labels[: tokens // 2] = -100
    return fused_linear_distillation_loss(
        inputs["hidden"],
        inputs["weight"].detach() if frozen else inputs["weight"],
        labels,
        teacher=inputs["teacher"] if kd else None,
        sft_weight=1 / tokens,
        kd_weight=0.35 / tokens,
        **arguments,
    ).loss


def ours_live(inputs: Inputs, top_k: bool = True, **arguments: Any) -> Tensor:
    """Distillation from a live teacher, without cross-entropy, as GKD does: its Top-K or its whole vocabulary."""
    teacher = LinearTeacher(
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
        top_k=inputs["teacher"].ids.shape[1] if top_k else None,
    )
    return fused_linear_distillation_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["labels"],
        teacher=teacher,
        sft_weight=0.0,
        kd_weight=1 / len(inputs["labels"]),
        **arguments,
    ).loss


SUITE = Suite(
    script=__file__,
    description=__doc__.splitlines()[0],
    cases={
        "three matmuls": floor,
        "cross-entropy": case(cross_entropy),
        "textbook SFT + KD": case(textbook),
        "TRL fused SFT": case(trl_fused_sft),
        "Liger fused CE": liger_cross_entropy,
        "cut-cross-entropy": cut_cross_entropy,
        "TRL GKD KL": case(trl_gkd, live=True, beta=0.0),
        "TRL GKD JSD 0.5": case(trl_gkd, live=True, beta=0.5),
        "TRL chunked KL": case(trl_chunked_divergence, live=True),
        "Liger fused JSD": liger_jsd,
        "ours SFT": case(ours, kd=False),
        "ours SFT + KD": case(ours),
        "ours SFT + KD, T=2": case(ours, temperature=2.0),
        "ours SFT + KD, half masked": case(ours, masked=True),
        "ours SFT + KD, frozen head": case(ours, frozen=True),
        "ours live Top-K KL": case(ours_live, live=True),
        "ours live Top-K JSD 0.5": case(ours_live, live=True, divergence="jsd"),
        "ours live full KL": case(ours_live, live=True, top_k=False),
        "ours live full JSD 0.5": case(ours_live, live=True, top_k=False, divergence="jsd"),
    },
    goals=[
        Goal("ours SFT + KD", "ours SFT", 1.03),
        Goal("ours SFT + KD, T=2", "ours SFT", 1.08),
        Goal("ours SFT + KD", "three matmuls", 1.30),
        Goal("ours SFT + KD", "cross-entropy", 0.85),
        Goal("ours SFT + KD", "textbook SFT + KD", 0.60),
        Goal("ours SFT + KD", "TRL fused SFT", 0.60),
        Goal("ours SFT + KD", "cross-entropy", 0.40, metric="peak_mib"),
        Goal("ours SFT + KD, half masked", "cross-entropy", 0.50),
        Goal("ours SFT + KD, frozen head", "cross-entropy", 0.55),
        Goal("ours SFT + KD, frozen head", "cross-entropy", 0.15, metric="peak_mib"),
        Goal("ours live Top-K KL", "TRL chunked KL", 0.67),
        Goal("ours live Top-K JSD 0.5", "TRL GKD JSD 0.5", 0.50),
        Goal("ours live Top-K JSD 0.5", "TRL GKD JSD 0.5", 0.35, metric="peak_mib"),
        Goal("ours live Top-K KL", "TRL GKD KL", 0.50),
        Goal("ours live Top-K KL", "TRL GKD KL", 0.35, metric="peak_mib"),
    ],
    options={
        "tokens": (1024, 64),
        "hidden": (896, 64),
        "vocab": (151936, 4001),
        "k": (25, 25),
        "dtype": ("float32", "float32"),
        "device": ("cpu", "cpu"),
    },
)

if __name__ == "__main__":
    SUITE.main()
