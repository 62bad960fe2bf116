"""A Top-K store without any trainer: a GRU of one's own, a plain PyTorch loop, the teacher from disk.

`capture` lets the teacher read each row once. From then on its word at a position is a few numbers: `store.row(i)` has the tokens and
the records' numbers, `store.read(numbers)` the ids and log-probabilities, exact at each captured temperature.

    python examples/store_in_plain_torch.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn

from trl_reasoning_distill import ReasoningFormat, TopKStore, load_problems, topk_divergence, worked_rows

TEACHER = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "models" / "teacher"
TEMPERATURE = 2.0


class GRUModel(nn.Module):
    """Anything that turns ids `(tokens,)` into logits `(tokens, vocab)` can learn from a store."""

    def __init__(self, vocab_size: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(ids))
        return self.head(hidden)


def distillation_loss(model: nn.Module, store: TopKStore, number: int) -> Tensor:
    """KL(teacher ‖ student) at the temperature, times T², per supervised token of row `number`."""
    row = store.row(number)
    records = store.read(range(row.offset, row.offset + row.count))  # one per supervised token, in order
    supervised = torch.from_numpy(row.labels != -100).nonzero()[:, 0]
    predicted_at = supervised[supervised > 0] - 1  # the token at t is predicted at t − 1
    logits = model(torch.tensor(row.input_ids).long())[predicted_at]

    ids = torch.from_numpy(records.ids).long()  # −1 where the store has none; its log-probability is −inf there
    teacher = torch.from_numpy(records.at_temperature(TEMPERATURE))
    student = (logits / TEMPERATURE).log_softmax(-1).gather(1, ids.clamp_min(0))
    return topk_divergence(student, teacher).mean() * TEMPERATURE**2


def main(folder: Path = Path("runs/examples/store"), problems: int = 64, epochs: int = 6) -> list[float]:
    """Capture, train, and return the mean loss of each epoch."""
    rows, _ = worked_rows(load_problems("synthetic_arithmetic", limit=problems), ReasoningFormat.preset("think"))
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", "capture"]
    options = {"teacher": TEACHER, "dataset": folder / "rows.jsonl", "output_dir": folder / "capture"}
    subprocess.run(
        [*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], check=True
    )

    store = TopKStore.open(folder / "capture")
    model = GRUModel(vocab_size=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for number in torch.randperm(store.rows).tolist():
            loss = distillation_loss(model, store, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / store.rows)
        print(f"epoch {epoch + 1}: {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
