"""Capture on two and three real processes, and killed in between: the same bytes as on one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.distributed.launching import ENVIRONMENT, launch_command
from trl_reasoning_distill.scripts import capture
from trl_reasoning_distill.teacher.store import TopKStore

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*has no chat template")]  # the story teller


def arguments(model: Path, dataset: Path, output: Path, unit_rows: int) -> list[str]:
    words = [
        "--teacher",
        model,
        "--dataset",
        dataset,
        "--output_dir",
        output,
        "--store_top_k",
        10,
        "--unit_rows",
        unit_rows,
    ]
    return [str(word) for word in words]


def command_of(processes: int, *where: Any) -> list[str]:
    return launch_command("ddp", processes, "-m", "trl_reasoning_distill.scripts", "capture", *arguments(*where))


def launch(processes: int, *where: Any) -> str:
    """What is printed; one process is this one, with as many threads as the others have: sums depend on their number."""
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                capture.main(arguments(*where))
        finally:
            torch.set_num_threads(threads)
        return printed.getvalue()
    done = subprocess.run(command_of(processes, *where), capture_output=True, text=True, env=ENVIRONMENT, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch_and_kill(done: Path, units: int, processes: int, *where: Any) -> None:
    """Kill a launcher as soon as some units are there; its ranks, which have sessions of their own, see it and go."""
    process = subprocess.Popen(
        command_of(processes, *where),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while len(list(done.glob("*/manifest.json"))) < units and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(is_at_work, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [rank for rank in ranks if is_at_work(rank)], "ranks have outlived their launcher"


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {
            "prompt": "Once upon a time",
            "completion": f" there was a cat who had {n} red balls." + " She was happy." * (n % 4),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, shared_data):
    dataset, model = write_rows(tmp_path / "rows.jsonl", 23), shared_data / "models" / "stories260K"
    for processes in (1, 2, 3):
        printed = launch(processes, model, dataset, tmp_path / f"on{processes}", 5)
        assert printed.count("capture: ") == 1, printed
        assert not (tmp_path / f"on{processes}" / "parts").exists()
    one, two, three = (files_of(tmp_path / f"on{processes}" / "store") for processes in (1, 2, 3))
    assert one == two == three
    assert TopKStore.open(tmp_path / "on2").rows == 23


def test_killed_launch_goes_on_with_other_numbers_of_processes(tmp_path, shared_data):
    """`kill -9` of two processes, then of three, then one finishes."""
    dataset, model = write_rows(tmp_path / "rows.jsonl", 400), shared_data / "models" / "stories260K"
    launch(1, model, dataset, tmp_path / "whole", 2)
    output = tmp_path / "killed"
    for units, processes in ((3, 2), (40, 3)):
        launch_and_kill(output / "parts", units, processes, model, dataset, output, 2)
        assert not (output / "store" / "manifest.json").exists()
    launch(1, model, dataset, output, 2)
    assert files_of(output / "store") == files_of(tmp_path / "whole" / "store")
