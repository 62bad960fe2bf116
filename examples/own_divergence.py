"""`TopKDistillTrainer` with a divergence of one's own: DistiLLM's skewed KL (arXiv:2402.03898).

KL(teacher ‖ λ · teacher + (1 − λ) · student) cannot be infinite, however sure the student is of something else. At λ = 0 it is the
trainer's own forward KL. Only `kd_loss` is overridden: data, targets, α, metrics and the pass over the LM head stay the trainer's.

    python examples/own_divergence.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from trl_reasoning_distill import ReasoningFormat, TopKDistillConfig, TopKDistillTrainer, load_problems, worked_rows

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "models"


class SkewedKLTrainer(TopKDistillTrainer):
    """Top-K distillation by KL(teacher ‖ λ · teacher + (1 − λ) · student), on the K tokens and one event for all others."""

    skew = 0.1  # λ

    def kd_loss(self, student_log_probs: Tensor, teacher_log_probs: Tensor, student_log_tail: Tensor) -> Tensor:
        """See `TopKDistillTrainer.kd_loss`."""
        # An entry outside the teacher's Top-K (the label may be one) has no probability of its own: it belongs to the tail.
        on_support = teacher_log_probs > -torch.inf
        teacher, student = teacher_log_probs.exp(), student_log_probs.exp()
        student_tail = student_log_tail.exp() + (student * ~on_support).sum(-1)
        p = torch.cat([teacher, (1 - teacher.sum(-1, keepdim=True)).clamp_min(0)], dim=-1)
        q = torch.cat([student * on_support, student_tail[:, None]], dim=-1)
        mixture = (self.skew * p + (1 - self.skew) * q).clamp_min(1e-30)  # 0 · log 0 is 0, but its gradient is NaN
        return (torch.xlogy(p, p) - torch.xlogy(p, mixture)).sum(-1)


def main(folder: Path = Path("runs/examples/own_divergence"), problems: int = 64, steps: int = 30) -> SkewedKLTrainer:
    """Capture the teacher on a few worked problems, and distil; returns the trainer."""
    rows, _ = worked_rows(load_problems("synthetic_arithmetic", limit=problems), ReasoningFormat.preset("think"))
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", "capture"]
    options = {"teacher": MODELS / "teacher", "dataset": folder / "rows.jsonl", "output_dir": folder / "capture"}
    subprocess.run(
        [*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], check=True
    )
    args = TopKDistillConfig(
        output_dir=str(folder / "trained"),
        teacher_logits=str(folder / "capture"),
        kd_weight=1.0,
        kd_warmup_ratio=0.0,
        max_steps=steps,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    trainer = SkewedKLTrainer(str(MODELS / "student"), args)
    trainer.train()
    return trainer


if __name__ == "__main__":
    losses = [entry["kd_loss"] for entry in main().state.log_history if "kd_loss" in entry]
    print(f"skewed KL: {losses[0]:.3f} → {losses[-1]:.3f}")
