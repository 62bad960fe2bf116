"""Capture on two real processes: the same bytes as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_reasoning_distill.teacher.store import TopKStore

pytestmark = pytest.mark.distributed


CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
use_cpu: true
mixed_precision: 'no'
num_machines: 1
num_processes: {processes}
main_process_port: 29571
"""


def launch(model: Path, dataset: Path, output: Path, processes: int) -> str:
    config = output.with_suffix(".yaml")
    config.write_text(CONFIG.format(kind="MULTI_GPU" if processes > 1 else "'NO'", processes=processes))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "trl_reasoning_distill.scripts.capture", "--model", str(model), "--dataset", str(dataset)]
    command += ["--output_dir", str(output), "--top_k", "10", "--unit_rows", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_make_the_bytes_of_one(tmp_path, shared_data):
    rows = [
        {
            "prompt": "Once upon a time",
            "completion": f" there was a cat who had {n} red balls." + " She was happy." * (n % 4),
        }
        for n in range(23)
    ]
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shared_data / "models" / "stories260K"
    for processes in (1, 2):
        printed = launch(model, dataset, tmp_path / f"on{processes}", processes)
        assert printed.count("capture: ") == 1, printed
    one, two = (
        {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        for folder in (tmp_path / "on1" / "store", tmp_path / "on2" / "store")
    )
    assert one == two
    assert not (tmp_path / "on2" / "parts").exists()
    assert TopKStore.open(tmp_path / "on2").rows == len(rows)
