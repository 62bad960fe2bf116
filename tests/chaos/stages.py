"""The process that dies: a stage's own `main`, in a process forked from a server that has imported everything once."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import peft  # noqa: F401  # these imports are what the server is for: a process forked from it starts at once
import torch
import trl.scripts  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from tests.chaos.harness import LOG, MEASURED, OUTPUT
from trl_reasoning_distill.scripts import verify
from trl_reasoning_distill.teacher.sampling import loop
from trl_reasoning_distill.trainer import topk_distill  # noqa: F401
from trl_reasoning_distill.trainer.gkd import trainer  # noqa: F401

with suppress(ImportError):  # transformers loads it for each training where it is installed
    import deepspeed  # noqa: F401


def run(
    stage: str,
    options: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    dies_at: int | None,
    file_limit: int | None,
) -> None:
    """Run a stage in `folder`, into `OUTPUT`; what it prints is appended to `LOG`.

    Args:
        stage: Its name.
        options: Its options but for the output folder.
        folder: The current folder of the process, so that all runs have the same options.
        environment: Variables to set.
        dies_at: SIGKILL just before it changes a file of the output for this time: where timing alone would hardly ever hit.
        file_limit: Bytes that a file may have: a full disk for those who cannot mount one.
    """
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    loop.in_chunks = lambda items: ([item] for item in items)  # type: ignore[assignment,misc]
    verify._CHUNK = 1  # a kill can come between any two rows
    changes = _count_changes(Path(folder, OUTPUT), dies_at)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    began = time.perf_counter()
    importlib.import_module(f"trl_reasoning_distill.scripts.{stage}").main([*options, "--output_dir", OUTPUT])
    seconds = time.perf_counter() - began
    Path(MEASURED).write_text(json.dumps({"seconds": seconds, "changes": len(changes)}))


def _count_changes(output: Path, dies_at: int | None) -> list[str]:
    """A list that grows with each change of a file below `output`; at the given one the process dies."""
    changes: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event == "open" and isinstance(args[2], int):
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(args[0], str | os.PathLike) and os.path.abspath(args[0]).startswith(str(output)):
            changes.append(event)
            if len(changes) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return changes
