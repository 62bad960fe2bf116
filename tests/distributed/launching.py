"""Real processes under the accelerate configs that ship, started by the product's own launcher on a machine without GPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from trl_reasoning_distill.launch import complete_launch_options

# What accelerate calls each launch once it runs on processes without a GPU. FSDP takes a shim: see `worker.py`
BACKENDS = {
    "cpu": "NO", "ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "zero3_offload": "DEEPSPEED", "fsdp2": "FSDP",
    "multi_node": "MULTI_CPU",
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def launch_command(config: str, processes: int, *words: str, port: int | None = None) -> list[str]:
    """The command of a launch; the launcher's further options come first in `words`, then `-m MODULE` with its own."""
    options = complete_launch_options(["--accelerate_config", config, "--num_processes", str(processes)])
    launcher = [sys.executable, "-m", "trl_reasoning_distill.launch", "--quiet", *options]
    return [*launcher, "--main_process_port", str(port or free_port()), *words]


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(config: str, folder: Path, job: dict[str, Any], *words: str, processes: int = 2) -> None:
    """Let `worker.py` do a job in `folder` on all processes; under `multi_node` each is a machine with a launch of its own.

    Raises:
        AssertionError: If one fails, with the end of what it said.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "job.json"
    about = {"folder": str(folder), "expect": BACKENDS[config], "processes": processes}
    file.write_text(json.dumps({**about, **job}, default=str))
    # What the processes compute in is the job's to say, so that they can be compared in float32
    words = ("--mixed_precision", "no", *words, "-m", "tests.distributed.worker", str(file))
    machines = processes if config == "multi_node" else 1
    port, running = free_port(), []
    for rank in range(machines):
        place = ("--num_machines", str(machines), "--machine_rank", str(rank)) if machines > 1 else ()
        command = launch_command(config, processes, *place, *words, port=port)
        log = (folder / f"machine{rank}.log").open("w")
        repository = Path(__file__).resolve().parents[2]
        running.append(subprocess.Popen(command, cwd=repository, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=900) for process in running]
    finally:
        for process in running:
            process.terminate()
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"machine{rank}.log").read_text()[-4000:]
