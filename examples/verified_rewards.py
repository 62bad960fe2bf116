"""Verified answers as rewards: TRL's `GRPOTrainer` with `verify_answers` and a `ReasoningFormat`.

TRL calls a reward function with the completions and the dataset's other columns, and wants a number per completion, or `None` for one
that shall not count. That is what a verdict is: right, wrong, or undecided (a time-out, a gold answer that nobody can read), which
must not be punished.

    python examples/verified_rewards.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_reasoning_distill import ReasoningFormat, load_problems, verify_answers

STUDENT = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "models" / "student"
FORMAT = ReasoningFormat.preset("think", system_prompt=None)
REWARDS = {"correct": 1.0, "incorrect": 0.0, "undecided": None}

Completions = list[list[dict[str, str]]]


def correct(completions: Completions, answer: list[str], **_: Any) -> list[float | None]:
    """1 for a right answer: exact, numeric or symbolic, in workers that can be killed; never an exception, never a hang."""
    verdicts = verify_answers([messages[-1]["content"] for messages in completions], answer)
    return [REWARDS[verdict.status] for verdict in verdicts]


def well_formed(completions: Completions, **_: Any) -> list[float]:
    """A tenth for reasoning in think tags and an answer behind them."""
    return [0.1 * FORMAT.parse(messages[-1]["content"]).well_formed for messages in completions]


def main(folder: Path = Path("runs/examples/grpo"), problems: int = 32, steps: int = 5) -> GRPOTrainer:
    """A few steps of GRPO on the quickstart's student; returns the trainer."""
    dataset = Dataset.from_list(
        [
            {"prompt": FORMAT.messages(problem.question), "answer": problem.answer}
            for problem in load_problems("synthetic_arithmetic", limit=problems, steps=(2, 3))
        ]
    )
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=96,
        max_steps=steps,
        learning_rate=1e-4,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    trainer = GRPOTrainer(model=str(STUDENT), reward_funcs=[correct, well_formed], args=args, train_dataset=dataset)
    trainer.train()
    return trainer


if __name__ == "__main__":
    for entry in main().state.log_history:
        if "reward" in entry:
            print(
                f"right: {entry['rewards/correct/mean']:.2f}   well formed: {entry['rewards/well_formed/mean'] * 10:.2f}"
            )
