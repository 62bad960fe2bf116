"""Every stage that touches a model, under every accelerate config that ships: what two processes make is what one makes."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cells import load_weights
from tests.distributed.launching import ENVIRONMENT, launch
from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.synthetic import iter_problems
from trl_reasoning_distill.scripts import sft

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # DeepSpeed compiles at its first start

Stage = tuple[str, list[str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows to train on."""
    form = ReasoningFormat.preset("think")
    problems = list(islice(iter_problems("train", seed=5), 16))
    replies = [form.render(problem.solution or "", str(problem.answer)) for problem in problems]
    return write_jsonl_file(
        tmp_path_factory.mktemp("rows") / "train.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "completion": [{"role": "assistant", "content": reply}],
            }
            for problem, reply in zip(problems, replies, strict=True)
        ],
    )


def write_jsonl_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(path, rows)
    return path


def training(models: Path, rows: Path, processes: int, **options: object) -> list[str]:
    """A short training's options, with the same global batch on any number of processes."""
    settings: dict[str, object] = {
        "model_name_or_path": models / "student", "dataset_path": rows, "per_device_train_batch_size": 8 // processes,
        "max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-4, "report_to": "none", "logging_steps": 1, "bf16": "false",
        "dtype": "float32", "gradient_checkpointing": "false", "save_strategy": "no", **options,
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def stages(folder: Path, models: Path, rows: Path, processes: int) -> list[Stage]:
    """The stages with their command lines, each into a folder of its own."""
    student, teacher = str(models / "student"), str(models / "teacher")
    asked = ["--source", "synthetic_arithmetic", "--limit", "9", "--max_new_tokens", "48"]
    lines = {
        "generate": ["--teacher", teacher, *asked, "--split", "train", "--num_samples", "2", "--temperature", "1"],
        "evaluate": ["--models", f"base={student}", f"teacher={teacher}", *asked, "--split", "test"],
        "capture": ["--teacher", teacher, "--dataset", str(rows), "--store_top_k", "10", "--unit_rows", "3"],
        "sft": training(models, rows, processes),
        "distill": training(models, rows, processes, teacher_logits=folder / "capture", kd_top_k=8),
        "gkd": training(models, rows, processes, teacher=teacher, lmbda=0.5, max_new_tokens=12),
    }
    return [(stage, [*words, "--output_dir", str(folder / stage)]) for stage, words in lines.items()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, quickstart_models: Path, rows: Path) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    launch("cpu", folder, {"stages": stages(folder, quickstart_models, rows, 1)}, processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "multi_node", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_two_processes_make_what_one_makes(
    config: str, alone: Path, tmp_path: Path, quickstart_models: Path, rows: Path
) -> None:
    launch(config, tmp_path, {"stages": stages(tmp_path, quickstart_models, rows, 2)})
    for part in ("generate/traces.jsonl", "generate/problems.jsonl", "capture/store"):
        assert files_of(tmp_path / part) == files_of(alone / part), part
    (answers, certainty), (others, other_certainty) = predictions(alone), predictions(tmp_path)
    assert others == answers
    assert other_certainty == pytest.approx(
        certainty, abs=2e-6
    )  # other rows share a batch, and it is written with six digits
    for stage in ("sft", "distill", "gkd"):
        one, two = (read_manifest(folder / stage).counts for folder in (alone, tmp_path))
        assert two == pytest.approx(one, rel=1e-6, abs=1e-6), stage
        weights, others = (load_weights(folder / stage / "final_model") for folder in (alone, tmp_path))
        assert max((weights[name] - others[name]).abs().max().item() for name in weights) <= 1e-6, stage


def files_of(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of all files of a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def predictions(folder: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """An evaluation's rows without the time that each took, and the mean log-probability of each."""
    rows = list(read_jsonl(folder / "evaluate" / "predictions.jsonl"))
    certainty = [row.pop("mean_log_prob") for row in rows]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows], certainty


def test_the_command_line_trains_one_model_on_two_processes(
    tmp_path: Path, quickstart_models: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.main([*training(quickstart_models, rows, 1), "--output_dir", str(tmp_path / "one")])
    command = [
        sys.executable,
        "-m",
        "trl_reasoning_distill.cli",
        "sft",
        "--accelerate_config",
        "cpu",
        "--num_processes",
    ]
    command += ["2", *training(quickstart_models, rows, 2), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sft: 2 steps") == 1, "one result, not one for each process"
    one, two = (read_manifest(tmp_path / name).counts for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-6)
