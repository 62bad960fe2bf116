"""The fused loss in a loop of one's own: cross-entropy and distillation in one pass over the LM head, without the logits.

At a vocabulary of 150,000 the logits are what a small student's memory is spent on. The fused loss takes the hidden states and the
head, and computes loss and gradient a chunk of tokens at a time. `whole_logits_loss` is the same in plain PyTorch.

    python examples/fused_loss.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_reasoning_distill import (
    LinearTeacher,
    ReasoningFormat,
    fused_linear_distillation_loss,
    load_problems,
    tokenize_example,
    worked_rows,
)

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "models"
KD_WEIGHT, TEMPERATURE = 1.0, 2.0


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """The last hidden states that predict the next token, `(tokens, hidden)`."""
    return model.model(input_ids).last_hidden_state[:, :-1].flatten(0, 1)


def fused_loss(student: Any, teacher: Any, vocab_size: int, input_ids: Tensor, labels: Tensor) -> Tensor:
    """`Σ (NLL + KD_WEIGHT · T² · KL) / tokens`; the head's logits never exist as a whole."""
    targets = labels[:, 1:].flatten()
    tokens = (targets != -100).sum().item()
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, input_ids)
    return fused_linear_distillation_loss(
        hidden_states(student, input_ids),
        student.lm_head.weight,
        targets,
        teacher=LinearTeacher(teacher_hidden, teacher.lm_head.weight, vocab_size=vocab_size),
        sft_weight=1 / tokens,
        kd_weight=KD_WEIGHT / tokens,
        temperature=TEMPERATURE,
    ).loss


def whole_logits_loss(student: Any, teacher: Any, vocab_size: int, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The same loss from the logits of both models, `(tokens, vocab)` each."""
    kept = labels[:, 1:] != -100
    logits = student(input_ids).logits[:, :-1][kept]
    with torch.no_grad():
        teacher_logits = teacher(input_ids).logits[:, :-1][kept]
    shared = [model_logits[:, :vocab_size] / TEMPERATURE for model_logits in (logits, teacher_logits)]
    kl = F.kl_div(*(each.log_softmax(-1) for each in shared), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, labels[:, 1:][kept]) + KD_WEIGHT * TEMPERATURE**2 * kl


def main(problems: int = 64, steps: int = 100) -> list[float]:
    """Train the quickstart's student on a few worked problems with its teacher beside it; returns the losses."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    roles = ("student", "teacher")
    student, teacher = (AutoModelForCausalLM.from_pretrained(MODELS / role, dtype=torch.float32) for role in roles)
    rows, _ = worked_rows(load_problems("synthetic_arithmetic", limit=problems), ReasoningFormat.preset("think"))
    examples = [tokenize_example(tokenizer, row) for row in rows]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        batch = examples[step % len(examples)]
        input_ids, labels = (torch.tensor([row]) for row in (batch.input_ids, batch.labels))
        loss = fused_loss(student, teacher, len(tokenizer), input_ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    every = main()
    print(f"loss: {sum(every[:20]) / 20:.3f} → {sum(every[-20:]) / 20:.3f}")
