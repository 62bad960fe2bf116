"""A training stage on two processes is one training: what `accelerate launch` starts is what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.synthetic import iter_problems

pytestmark = pytest.mark.distributed


def launch(tmp_path: Path, model: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", "sft", "--accelerate_config", "cpu"]
    command += ["--num_processes", str(processes), "--model_name_or_path", str(model)]
    command += ["--dataset_path", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / f"on{processes}")]
    command += ["--per_device_train_batch_size", str(8 // processes), "--max_steps", "2", "--report_to", "none"]
    command += ["--bf16", "false", "--dtype", "float32", "--gradient_checkpointing", "false", "--logging_steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_two_processes_train_one_model(tmp_path: Path, quickstart_models: Path) -> None:
    form = ReasoningFormat.preset("think")
    write_jsonl(
        tmp_path / "train.jsonl",
        (
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "completion": [
                    {"role": "assistant", "content": form.render(problem.solution or "", str(problem.answer))}
                ],
            }
            for problem in islice(iter_problems("train", seed=5), 16)
        ),
    )
    counts = []
    for processes in (1, 2):
        done = launch(tmp_path, quickstart_models / "student", processes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("sft: 2 steps") == 1, "one result, not one for each process"
        counts.append(read_manifest(tmp_path / f"on{processes}").counts)
    one, two = counts
    assert two["supervised_tokens_seen"] == one["supervised_tokens_seen"]
    assert two["sft_loss"] == pytest.approx(one["sft_loss"], rel=2e-5)
