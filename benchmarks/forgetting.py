"""Does the KL term to the reference keep what fine-tuning on reasoning would forget?

    python benchmarks/forgetting.py --model SmolLM2-135M-Instruct --data gsm8k --output benchmarks/results/forgetting.json
    python benchmarks/forgetting.py --model SmolLM2-135M-Instruct --data gsm8k --quick --json     # does it run?

A pretrained model gets a LoRA adapter (the preset of the chain-of-thought recipe: r 32, α 64, attention and MLP) on GSM8K solutions,
once per coefficient and seed, everything else alike. Measured before, on the way and after: the loss on held-out GSM8K solutions
(the task), and the perplexity on text that has nothing to do with it: the docstrings of Python's standard library. Runs that
`--output` holds already are not repeated, so the work can be done in pieces (`--max_runs`).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_reasoning_distill.data.files import read_json, read_jsonl, write_json
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.losses.fused import fused_linear_distillation_loss
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

UNRELATED = (  # modules
    "abc argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv datetime decimal difflib dis "
    "doctest email enum fnmatch fractions functools gettext glob gzip hashlib heapq html http imaplib inspect io ipaddress json locale "
    "logging mailbox mimetypes numbers operator os pdb pickle platform profile queue random re sched secrets shelve shlex shutil "
    "socket sqlite3 ssl string struct subprocess tarfile tempfile textwrap threading timeit tokenize traceback types typing unittest "
    "urllib.parse urllib.request uuid warnings weakref webbrowser xml.etree.ElementTree zipfile zipimport"
)
CONTEXT = 256


def unrelated_text() -> str:
    """Docstrings of the standard library, one after the other."""
    return "\n\n".join(inspect.getdoc(importlib.import_module(name)) or "" for name in UNRELATED.split())


def solutions(path: Path, count: int, seed: int, longest: int) -> list[dict[str, str]]:
    """Prompt–completion rows of GSM8K, calculator marks removed; short ones, for the sake of the CPU."""
    rows = [row for row in read_jsonl(path) if len(row["question"]) + len(row["answer"]) <= longest]
    chosen = random.Random(seed).sample(rows, count)
    return [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": " " + re.sub(r"<<.*?>>", "", row["answer"])}
        for row in chosen
    ]


@torch.no_grad()
def mean_nll(model: Any, rows: Iterable[tuple[list[int], list[int]]]) -> float:
    """Mean negative log-likelihood of the labelled tokens, in nats."""
    model.eval()
    base, total, count = model.get_base_model(), 0.0, 0
    for input_ids, labels in rows:
        hidden = base.base_model(torch.tensor([input_ids], device=model.device)).last_hidden_state[0, :-1]
        targets = torch.tensor(labels[1:], device=model.device)
        out = fused_linear_distillation_loss(hidden, base.get_output_embeddings().weight, targets)
        total, count = total + float(out.nll.double().sum()), count + int(out.mask.sum())
    model.train()
    return total / count


class Probe(TrainerCallback):
    """Measures task and unrelated text on the way."""

    def __init__(self, task: list[Any], text: list[Any], every: int) -> None:
        self.task, self.text, self.every = task, text, every
        self.curve: list[dict[str, float]] = []

    def measure(self, model: Any, step: int) -> None:
        """Add a point to the curve."""
        task, text = mean_nll(model, self.task), mean_nll(model, self.text)
        self.curve.append({"step": step, "task_loss": round(task, 5), "perplexity": round(math.exp(text), 4)})
        print(f"  {self.curve[-1]}", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(kwargs["model"], state.global_step)


def run(options: argparse.Namespace, coefficient: float, seed: int) -> dict[str, Any]:
    """Fine-tune once and measure."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    train = solutions(options.data / "train.jsonl", options.rows, seed, options.longest)
    held_out = solutions(options.data / "test.jsonl", options.held_out, 0, options.longest)
    task = [(e.input_ids, e.labels) for row in held_out for e in [tokenize_example(tokenizer, row)]]
    ids = tokenizer(unrelated_text())["input_ids"]
    blocks = [ids[at : at + CONTEXT] for at in range(0, len(ids) - CONTEXT, CONTEXT)]
    text = [(block, block) for block in blocks[:: len(blocks) // options.blocks][: options.blocks]]
    steps = options.rows * options.epochs // options.batch_size
    probe = Probe(task, text, every=max(1, steps // options.points))
    lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        config = ReasoningSFTConfig(
            folder, bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=options.batch_size, num_train_epochs=options.epochs, learning_rate=options.learning_rate,
            lr_scheduler_type="linear", warmup_steps=3, gradient_checkpointing=False, seed=seed, reasoning_format="gsm8k",
            use_kl_regularization=coefficient > 0, kl_coef=coefficient, kl_direction=options.direction, logging_steps=5,
        )  # fmt: skip
        trainer = ReasoningSFTTrainer(
            model, config, train_dataset=Dataset.from_list(train), processing_class=tokenizer, callbacks=[probe], peft_config=lora
        )  # fmt: skip
        probe.measure(trainer.model, 0)
        began = time.process_time()
        trainer.train()
    divergence = [entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry]
    return {
        "coefficient": coefficient,
        "seed": seed,
        "steps": trainer.state.global_step,
        "kl_loss": round(divergence[-1], 4) if divergence else None,
        "cpu_seconds": round(time.process_time() - began),
        "curve": probe.curve,
    }


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By coefficient: means over seeds, the rise of each seed, and its ratio to the rise of the same seed without the term."""
    plain = {run["seed"]: run["curve"] for run in runs if run["coefficient"] == 0}
    table = []
    for coefficient in sorted({run["coefficient"] for run in runs}):
        curves = {run["seed"]: run["curve"] for run in runs if run["coefficient"] == coefficient}
        rises = {seed: curve[-1]["perplexity"] - curve[0]["perplexity"] for seed, curve in curves.items()}
        row: dict[str, Any] = {"kl_coef": coefficient, "seeds": sorted(curves)}
        for name in ("task_loss", "perplexity"):
            row[f"{name}_before"] = round(statistics.mean(curve[0][name] for curve in curves.values()), 3)
            row[f"{name}_after"] = round(statistics.mean(curve[-1][name] for curve in curves.values()), 3)
        row["rise_of_perplexity"] = {seed: round(rise, 3) for seed, rise in sorted(rises.items())}
        shared = {seed: plain[seed][-1]["perplexity"] - plain[seed][0]["perplexity"] for seed in rises if seed in plain}
        if coefficient and shared:
            ratios = {seed: round(rises[seed] / rise, 3) for seed, rise in sorted(shared.items())}
            row["rise_over_rise_without_kl"] = ratios
            row["task_loss_minus_task_loss_without_kl"] = {
                seed: round(curves[seed][-1]["task_loss"] - plain[seed][-1]["task_loss"], 4) for seed in ratios
            }
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, help="JSON file of finished runs, read and extended")
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--direction", default="reverse", choices=["reverse", "forward"])
    parser.add_argument("--rows", type=int, default=24, help="training rows")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--held_out", type=int, default=10, help="held-out solutions")
    parser.add_argument("--blocks", type=int, default=6, help=f"blocks of {CONTEXT} tokens of unrelated text")
    parser.add_argument("--longest", type=int, default=330, help="characters of a question and its solution")
    parser.add_argument("--points", type=int, default=2, help="measurements on the way")
    parser.add_argument("--max_runs", type=int, help="stop after this many runs; the next call goes on")
    parser.add_argument("--quick", action="store_true", help="few rows, one seed, one epoch: does it run?")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.epochs, options.seeds, options.held_out, options.blocks = 8, 1, [0], 2, 1
    torch.set_num_threads(1)
    measure_all(options)


def _portable(words: list[str]) -> list[str]:
    """The command line with folders by their last name, so that it says nothing of one machine."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def measure_all(options: argparse.Namespace) -> None:
    """Do the runs that are missing, keep each at once, and print the table."""
    own = ("output", "max_runs", "json", "quick", "coefficients", "seeds", "data", "model")
    settings = {name: value for name, value in vars(options).items() if name not in own}
    runs: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        saved = read_json(options.output)
        if saved["settings"] != settings:
            raise SystemExit(f"{options.output} holds runs of other settings: {saved['settings']}")
        runs = saved["runs"]
    done = {(run["coefficient"], run["seed"]) for run in runs}
    missing = [(c, seed) for seed in options.seeds for c in options.coefficients if (c, seed) not in done]
    report: dict[str, Any] = {}
    for coefficient, seed in missing[: options.max_runs]:
        print(f"kl_coef {coefficient:g}, seed {seed}", file=sys.stderr, flush=True)
        runs.append(run(options, coefficient, seed))
        report = {
            "command": shlex.join(["python", "benchmarks/forgetting.py", *_portable(sys.argv[1:])]),
            "model": Path(options.model).name,
            "settings": settings,
            "table": summarize(runs),
            "runs": runs,
        }
        if options.output:
            write_json(options.output, report)
    report = report or read_json(options.output)
    if not options.json:
        for row in report["table"]:
            print(row)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
