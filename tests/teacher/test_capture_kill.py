"""`kill -9` at any moment, again and again: what is left goes on, and the result is the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import xxhash

from tests.teacher.records import make_records
from tests.teacher.tiny import make_tokenizer
from trl_reasoning_distill.teacher.capture import CaptureConfig, capture

CONFIG = CaptureConfig(top_k=6, temperatures=(1.0, 2.0), unit_rows=2)
ROWS = [{"prompt": f"{n} and {n}: ", "completion": f"it is {2 * n}."} for n in range(16)]


class SlowReader:
    """Made-up records that depend on the row alone, after a moment's thought."""

    context_length = None
    provenance: dict[str, str] = {}  # noqa: RUF012

    def read(self, rows, positions):
        time.sleep(0.005)
        seeds = [xxhash.xxh32_intdigest(bytes(str(row), "ascii")) for row in rows]
        return [make_records(len(ts), 6, vocab_size=256, seed=seed) for ts, seed in zip(positions, seeds, strict=True)]


def run(folder: Path) -> None:
    capture(SlowReader, make_tokenizer(), ROWS, folder / "store", CONFIG, fingerprint={"teacher": "made up"})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a process that is killed must start at once")
def test_killed_at_any_moment_it_makes_the_same_bytes(tmp_path):
    started = time.monotonic()
    run(tmp_path / "whole")
    whole, seconds = files_of(tmp_path / "whole"), time.monotonic() - started
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    unfinished = 0
    for trial in range(4):
        folder = tmp_path / str(trial)
        for _ in range(2):
            process = context.Process(target=run, args=(folder,))
            process.start()
            time.sleep(rng.uniform(0.0, 0.7 * seconds))
            os.kill(process.pid, signal.SIGKILL)
            process.join(timeout=10)
            unfinished += process.exitcode == -signal.SIGKILL
        run(folder)
        assert files_of(folder) == whole, f"trial {trial}"
    assert unfinished >= 3
