"""How far the loss and its gradients are from the formula in float64, beside all logits in memory and autograd.

    python benchmarks/precision.py --output benchmarks/results/precision

Two students at the width of Qwen2.5-0.5B: one that knows nothing, and one that is sure of most labels. The inputs are rounded to
the dtype first, so what is measured is the arithmetic. T = 2, Top-25 targets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from trl_reasoning_distill.losses.divergence import TopKTargets, topk_divergence
from trl_reasoning_distill.losses.fused import fused_linear_distillation_loss

TEMPERATURE, K, GOALS = 2.0, 25, {"float32": 1e-6, "bfloat16": 2.5e-3}


def materialised(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: TopKTargets, upcast: torch.dtype) -> Tensor:
    """Cross-entropy and Top-K KL from all logits."""
    logits = (hidden @ weight.t()).to(upcast)
    student = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, teacher.ids)
    kd = topk_divergence(student, teacher.log_probs.to(upcast)).sum() * TEMPERATURE**2
    return F.cross_entropy(logits, labels, reduction="sum") + kd


def errors(sure: bool, dtype: torch.dtype, tokens: int, vocab: int, width: int) -> dict[str, Any]:
    """Relative errors of the loss and of its gradients (the larger of hidden states' and head's), ours and materialised."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, width) * 0.05
    labels = torch.randint(vocab, (tokens,))
    hidden = torch.randn(tokens, width) + (7 * weight[labels] if sure else 0)
    top = torch.log_softmax((hidden @ weight.t() + torch.randn(tokens, vocab)) / TEMPERATURE, -1).topk(K)
    teacher = TopKTargets(top.indices, top.values)
    rounded = [hidden.to(dtype), weight.to(dtype)]

    def run(dtype: torch.dtype, upcast: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in rounded]
        if upcast is None:
            settings = {"kd_weight": 1.0, "temperature": TEMPERATURE}
            loss = fused_linear_distillation_loss(*leaves, labels, teacher=teacher, **settings).loss
        else:
            loss = materialised(*leaves, labels, teacher, upcast)
        return loss.detach().double(), [grad.double() for grad in torch.autograd.grad(loss, leaves)]

    truth, true_grads = run(torch.float64, torch.float64)
    result = {"student": "sure" if sure else "knows nothing", "dtype": str(dtype).removeprefix("torch.")}
    for name, upcast in (("ours", None), ("materialised", torch.float32)):
        loss, grads = run(dtype, upcast)
        gradient = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, true_grads, strict=True))
        result[name] = {"loss": float((loss - truth).abs() / truth), "gradient": gradient}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.md and OUTPUT.json")
    options = parser.parse_args()
    shape = (8, 500, 64) if options.quick else (48, 32768, 896)
    rows = [errors(sure, dtype, *shape) for sure in (False, True) for dtype in (torch.float32, torch.bfloat16)]
    lines = [
        "| student | dtype | loss | of all logits | gradients | of all logits | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[side][what]:.1e}" for what in ("loss", "gradient") for side in ("ours", "materialised")]
        goal = GOALS[row["dtype"]]
        reached = "reached" if row["ours"]["gradient"] <= goal else "missed"
        lines.append(f"| {row['student']} | {row['dtype']} | {' | '.join(cells)} | ≤ {goal:.1e}, {reached} |")
    table = "\n".join(lines) + "\n"
    report = json.dumps({"shape": dict(zip(("tokens", "vocab", "width"), shape, strict=True)), "errors": rows})
    if options.output:
        options.output.with_suffix(".md").write_text(table)
        options.output.with_suffix(".json").write_text(report + "\n")
    if not options.json:
        print(table)
    print(report)


if __name__ == "__main__":
    main()
