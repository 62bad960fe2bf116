"""The road from problems to answers on real pretrained models and real GSM8K problems, walked through the stages' own `main`s."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem, Trace
from trl_reasoning_distill.scripts import capture, distill, evaluate, generate, verify
from trl_reasoning_distill.teacher.store import StoredRow, TopKStore

FORMAT = "gsm8k"
TOP_M = 25
TOP_K = 10
TEMPERATURE = 2.0
GOLD = "gsm8k"  # stands as the model of GSM8K's own solutions


@dataclasses.dataclass(frozen=True)
class Road:
    """A road that was walked.

    Attributes:
        folder: Holds the folder of each stage.
        teacher: Folder of the teacher.
        student: Folder of the student before training.
        problems: The problems of GSM8K that were walked with.
        steps: Optimizer steps of the distillation; each sees every row.
    """

    folder: Path
    teacher: Path
    student: Path
    problems: list[Problem]
    steps: int

    @property
    def distilled(self) -> Path:
        return self.folder / "distill" / "final_model"

    @property
    def store(self) -> TopKStore:
        return TopKStore.open(self.folder / "capture")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.teacher)

    def rows(self, file: str) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder / file))


def walk(
    folder: Path,
    teacher: Path,
    student: Path,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    steps: int,
    learning_rate: float,
) -> Road:
    """generate → verify → capture → distill → evaluate, in this process.

    GSM8K's own solutions are verified beside what the teacher writes, as the first sample of each problem; the strategy `first`
    then trains on them.
    """
    road = Road(folder, teacher, student, list(problems), steps)
    write_jsonl(folder / "problems.jsonl", (problem.to_row() for problem in problems))
    asked = {
        "source": folder / "problems.jsonl",
        "response_format": FORMAT,
        "max_new_tokens": max_new_tokens,
        "device": "cpu",
    }
    run(generate, folder, teacher=teacher, **asked)
    write_jsonl(folder / "traces.jsonl", (trace.to_row() for trace in all_traces(road)))
    run(verify, folder, traces=folder / "traces.jsonl", response_format=FORMAT, strategy="first")
    run(capture, folder, teacher=teacher, dataset=folder / "verify", store_top_k=TOP_M, temperatures=(1.0, TEMPERATURE))
    run(
        distill,
        folder,
        model_name_or_path=student,
        teacher_logits=folder / "capture",
        dtype="float32",
        kd_top_k=TOP_K,
        kd_temperature=TEMPERATURE,
        kd_weight=10.0,  # the texts are GSM8K's, not the teacher's: at 1 the student would follow them away from the teacher
        per_device_train_batch_size=len(problems),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16="false",
        gradient_checkpointing="false",
        save_strategy="no",
        report_to="none",
    )
    run(evaluate, folder, models=(f"base={student}", f"teacher={teacher}", f"distilled={road.distilled}"), **asked)
    return road


def run(stage: Any, folder: Path, **options: Any) -> None:
    """Run a stage's `main` on a command line."""
    words = ["--output_dir", str(folder / stage.__name__.rpartition(".")[2])]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    stage.main(words)


def all_traces(road: Road) -> list[Trace]:
    """GSM8K's own solution of each problem as sample 0, then what the teacher wrote."""
    written = {row["problem_id"]: Trace.from_row(row) for row in road.rows("generate/traces.jsonl")}
    traces = []
    for problem in road.problems:
        text = ReasoningFormat.preset(FORMAT).render(str(problem.solution), str(problem.answer))
        of_teacher = dataclasses.replace(written[problem.id], sample=1)
        gold = dataclasses.replace(of_teacher, sample=0, completion=text, finish_reason="stop", model=GOLD)
        traces += [gold, of_teacher]
    return traces


def load(path: Path) -> PreTrainedModel:
    """A model in float32, as the CPU runs it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def dense_log_probs(model: PreTrainedModel, row: StoredRow, temperature: float = 1.0) -> Tensor:
    """`(supervised, vocabulary)` in float64: what predicts each supervised token of a row, by the model's own forward pass."""
    logits = model(torch.tensor(row.input_ids, dtype=torch.long)[None]).logits[0, :-1]
    return (logits[torch.from_numpy(row.labels[1:] != -100)].double() / temperature).log_softmax(-1)


def bucketed_kl(teacher: Tensor, student: Tensor, ids: Tensor) -> Tensor:
    """`(tokens,)`: KL(teacher ‖ student) over the given ids and one bucket for all other tokens, from dense log-probabilities."""
    ours, theirs = (log_probs.gather(-1, ids).exp() for log_probs in (student, teacher))
    student_buckets, teacher_buckets = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (ours, theirs))
    return (teacher_buckets * (teacher_buckets / student_buckets).log()).sum(-1)
