"""What runs on each process of a launch: `accelerate launch … -m tests.distributed.worker JOB.json`.

A job is a list of trainings (`cells`, by name) or of stages with their command lines, done one after the other in the same processes,
since starting those is what takes the time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def shim_fsdp_on_cpu() -> None:
    """Let accelerate take FSDP on gloo processes; it would silently fall back to DDP, which the product refuses."""
    import torch
    from accelerate import state
    from accelerate.utils import DistributedType

    from trl_reasoning_distill import processes

    os.environ["ACCELERATE_USE_CPU"] = "false"
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    processes.check_launch = lambda _: None


def run_cells(job: dict[str, Any]) -> None:
    """Train the cells. One that fails leaves its traceback as its result, and the others go on."""
    from tests.distributed.cells import CELLS, train

    for name in job["cells"]:
        folder = Path(job["folder"], name)
        try:
            train(CELLS[name], Path(job["material"]), folder, expect=job["expect"])
        except Exception:
            folder.mkdir(exist_ok=True)
            (folder / "result.json").write_text(json.dumps({"error": traceback.format_exc()}))


def run_stages(job: dict[str, Any]) -> None:
    """Run the stages as their own command lines would, and see that each training ran on what was launched."""
    from accelerate import Accelerator, PartialState

    Accelerator.end_training = lambda self: None  # it would end the process group, which the next stage needs
    for stage, words in job["stages"]:
        importlib.import_module(f"trl_reasoning_distill.scripts.{stage}").main(words)
        state = PartialState()
        assert state.num_processes == job["processes"], (stage, state.num_processes)
        if stage in ("sft", "distill", "gkd"):
            assert state.distributed_type.value == job["expect"], (stage, state.distributed_type)


def main(file: str) -> None:
    """Do the job in this process."""
    job = json.loads(Path(file).read_text())
    if job["expect"] == "FSDP":
        shim_fsdp_on_cpu()
    run_cells(job) if "cells" in job else run_stages(job)
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
