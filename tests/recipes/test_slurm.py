"""The job scripts, with SLURM's two commands played by small programs and everything else real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.test_interruption import write_rows
from trl_reasoning_distill.data.manifest import read_manifest

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPTS = sorted((REPOSITORY / "recipes/slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / "recipes/slurm/requeue.sh"], ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_asks_slurm_for_a_warning_and_to_come_back(script: Path) -> None:
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert any("--signal=B:USR1@" in line for line in options)
    assert any("--requeue" in line for line in options)
    assert any("--open-mode=append" in line for line in options)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` runs its words here, and `scontrol` notes what it is asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi\n',
        "trl-distill": f'exec {sys.executable} -m trl_reasoning_distill.cli "$@"\n',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    write_rows(tmp_path / "train.jsonl")
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "ACCELERATE_CONFIG": "cpu",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def test_a_training_that_meets_its_limit_saves_is_requeued_and_goes_on(
    tmp_path: Path, cluster: dict[str, str], quickstart_models: Path
) -> None:
    command = ["bash", "recipes/slurm/train.sbatch", "sft", "--model_name_or_path", str(quickstart_models / "student")]
    command += ["--dataset_path", "train.jsonl", "--output_dir", "out", "--max_steps", "8", "--logging_steps", "1"]
    command += ["--save_strategy", "no", "--report_to", "none", "--bf16", "false", "--dtype", "float32"]
    command += ["--gradient_checkpointing", "false", "--per_device_train_batch_size", "2"]

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    job = submit()
    assert job.stdout is not None
    seen = []
    for line in job.stdout:
        seen.append(line)
        if "'loss'" in line:
            job.send_signal(signal.SIGUSR1)
            break
    output = "".join(seen) + job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert "queued again" in output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    job = submit()
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert "going on from out/checkpoint-" in output
    assert read_manifest(tmp_path / "out").counts["steps"] == 8
    assert (tmp_path / "asked").read_text() == "requeue 77\n", "a job that ends by itself is not requeued"
