"""Kill a stage at random moments, let it end, and look whether it made what it makes in peace.

A stage is its own `main` in a process that is forked from a server (`stages.py`), so that it starts at once. Half of the moments are
drawn from its running time; the others from the changes it makes to its files, because that is where something can be lost.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import socket
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

OUTPUT = "out"
LOG = "log.txt"
MEASURED = "measured.json"
"""How long a run took, and how often it changed a file of its output."""

TIMES = frozenset(
    {"started", "seconds", "wall_seconds", "tokens_per_second", "generated_tokens_per_second"}
    | {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}  # of the last go alone
    | {"result"}  # the manifest's line for a reader, with the time that a generation took
)
"""Fields of JSON files that tell when, how long or how fast, and so may differ between two runs."""

_HASHES = "checkpoint_manifest.json"  # of files that are compared themselves, one of which tells times


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage to be killed.

    Attributes:
        name: Its name.
        options: Its options but for the output folder.
        ranks: Number of its processes, all of which are killed at once.
    """

    name: str
    options: tuple[str, ...]
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that went to its end: what it made, how long that took, and how often it changed a file."""

    contents: Mapping[str, Any]
    seconds: float
    changes: int


def start(
    stage: Stage, folder: Path, *, dies_at: int | None = None, file_limit: int | None = None
) -> list[BaseProcess]:
    """Start the processes of a stage, which writes into `folder / OUTPUT`; see `stages.run`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.stages"])
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = []
    for rank in range(stage.ranks):
        environment = {} if stage.ranks == 1 else {
            "WORLD_SIZE": str(stage.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        arguments = (stage.name, stage.options, str(folder), environment, dies_at, file_limit)
        processes.append(context.Process(target=_run, args=arguments))
        processes[-1].start()
    return processes


def finish(stage: Stage, folder: Path) -> Whole:
    """Let a stage go to its end, from wherever it was."""
    processes = start(stage, folder)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * stage.ranks, (folder / LOG).read_text()
    return Whole(_contents(folder / OUTPUT), **json.loads((folder / MEASURED).read_text()))


def torment(stage: Stage, whole: Whole, folder: Path, kills: int, *, seed: int = 0, kills_per_run: int = 3) -> None:
    """Kill a stage so often, each of its runs a few times; what each leaves in the end must be what `whole` left.

    Raises:
        AssertionError: Naming the files that differ, the seed, and the run.
    """
    rng = random.Random(f"{stage.name} {stage.ranks} {seed}")
    run = 0
    while kills > 0:
        here, done = folder / str(run), 0
        while done < min(kills, kills_per_run) and _kill(stage, whole, here, rng):
            done += 1
        found = finish(stage, here).contents
        differing = sorted(
            name for name in found.keys() | whole.contents.keys() if found.get(name) != whole.contents.get(name)
        )
        assert not differing, (
            f"{stage.name}, seed {seed}, run {run}, after {done} kills: {differing} differ; see {here}"
        )
        kills -= done
        run += 1


def _kill(stage: Stage, whole: Whole, folder: Path, rng: random.Random) -> bool:
    """Start a stage and kill it at a moment of a whole run; whether that came before its end."""
    by_change = stage.ranks == 1 and rng.random() < 0.5
    processes = start(stage, folder, dies_at=rng.randint(1, whole.changes) if by_change else None)
    if not by_change:
        processes[0].join(rng.uniform(0, whole.seconds))
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert all(code in (0, -9) for code in codes), f"{codes}: {(folder / LOG).read_text()}"
    return -9 in codes


def _contents(output: Path) -> dict[str, Any]:
    """Every file below a folder in a form that can be compared: the bytes, of JSON the values but for `TIMES`."""
    files = (file for file in output.rglob("*") if file.is_file() and file.name != _HASHES)
    return {file.relative_to(output).as_posix(): _read(file) for file in files}


def _read(file: Path) -> Any:
    if file.suffix == ".json":
        return _without_times(json.loads(file.read_bytes()))
    if file.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in file.read_bytes().splitlines()]
    return file.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(*arguments: Any) -> None:
    from tests.chaos import stages  # the server has it; this process needs none of what it imports

    stages.run(*arguments)
