"""SIGTERM in the middle of a training: a checkpoint, the command that goes on, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.synthetic import iter_problems


def start(folder: Path, model: Path, name: str, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", "sft", "--accelerate_config", "cpu", *launcher]
    command += ["--model_name_or_path", str(model), "--dataset_path", "train.jsonl", "--output_dir", name]
    command += ["--max_steps", "12", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    command += ["--save_strategy", "no", "--report_to", "none", "--bf16", "false", "--dtype", "float32"]
    command += ["--gradient_checkpointing", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def write_rows(path: Path) -> None:
    form = ReasoningFormat.preset("think")
    write_jsonl(
        path,
        (
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "completion": [
                    {"role": "assistant", "content": form.render(problem.solution or "", str(problem.answer))}
                ],
            }
            for problem in islice(iter_problems("train", seed=5), 64)
        ),
    )


def check_stop_and_resume(folder: Path, model: Path, *launcher: str) -> None:
    write_rows(folder / "train.jsonl")
    whole = start(folder, model, "whole", *launcher)
    output = whole.communicate(timeout=500)[0]
    assert whole.returncode == 0, output

    process = start(folder, model, "stopped", *launcher)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "'loss'" in line:  # the first step is logged, eleven are to come
            process.send_signal(signal.SIGTERM)
            break
    output = "".join(seen) + process.communicate(timeout=500)[0]
    assert process.returncode == 143, output
    assert "sft: saved checkpoint-" in output
    assert "Stopped by SIGTERM; what was made is kept. Go on from here with: trl-distill sft" in output
    assert "Traceback" not in output
    (checkpoint,) = (folder / "stopped").glob("checkpoint-*")
    assert int(checkpoint.name.partition("-")[2]) < 12

    again = start(folder, model, "stopped", *launcher)
    output = again.communicate(timeout=500)[0]
    assert again.returncode == 0, output
    assert f"going on from stopped/{checkpoint.name}" in output
    one, two = (load_file(folder / name / "final_model/model.safetensors") for name in ("whole", "stopped"))
    assert all((one[key] == two[key]).all() for key in one)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, quickstart_models: Path) -> None:
    check_stop_and_resume(tmp_path, quickstart_models / "student")


@pytest.mark.distributed
def test_two_processes_stop_at_one_step(tmp_path: Path, quickstart_models: Path) -> None:
    check_stop_and_resume(tmp_path, quickstart_models / "student", "--num_processes", "2")
