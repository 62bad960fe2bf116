"""A folder has one writer: live ones are named, dead ones are not waited for, and no trace is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trl_reasoning_distill import folders
from trl_reasoning_distill.folders import LOCK_NAME, WRITER_NAME, FolderInUseError, one_writer

HOLD = """
import sys, time
from pathlib import Path
from trl_reasoning_distill.folders import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def note(folder: Path, age: float = 0.0, **writer: object) -> None:
    path = folder / WRITER_NAME
    path.write_text(json.dumps(writer))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(
        FolderInUseError, match=rf"Process {holder.pid} on {socket.gethostname()}, started 20.*is writing into"
    ):
        one_writer(tmp_path).__enter__()


def test_a_writer_that_was_killed_is_not_waited_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / WRITER_NAME).exists()
    with one_writer(tmp_path):
        assert json.loads((tmp_path / WRITER_NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_that_nobody_has_waited_for_is_dead(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Ranks whose launcher was killed stay in the table of processes, as zombies, until somebody asks for their exit code."""
    holder.send_signal(signal.SIGKILL)
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with one_writer(tmp_path):
        assert json.loads((tmp_path / WRITER_NAME).read_text())["pid"] == os.getpid()


def test_without_reliable_locks_the_note_tells_who_lives(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    (tmp_path / LOCK_NAME).unlink()  # as if the file system had no locks: a new one can be had
    with pytest.raises(FolderInUseError, match=rf"Process {holder.pid} "):
        one_writer(tmp_path).__enter__()
    writer = json.loads((tmp_path / WRITER_NAME).read_text())
    note(tmp_path, **{**writer, "started": "2020-01-01T00:00:00+00:00"})  # its number was given to another process
    with one_writer(tmp_path):
        pass


def test_a_writer_on_another_machine_is_dead_when_it_gives_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(tmp_path, age=folders.SILENCE_SECONDS + 5, host="node7", pid=1, started="x")
    with one_writer(tmp_path):
        pass
    note(tmp_path, age=1.0, host="node7", pid=1, started="x")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        os.utime(tmp_path / WRITER_NAME)  # it beats

    monkeypatch.setattr(folders.time, "sleep", sleep)
    with pytest.raises(FolderInUseError, match="Process 1 on node7, started x, is writing"):
        one_writer(tmp_path).__enter__()
    assert slept
    assert [path.name for path in tmp_path.iterdir()] == [WRITER_NAME]


def test_a_note_that_a_kill_has_cut_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / WRITER_NAME).write_text('{"host": "no')
    with one_writer(tmp_path):
        pass


def test_a_writer_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "BEAT_SECONDS", 0.01)
    with one_writer(tmp_path):
        os.utime(tmp_path / WRITER_NAME, (0, 0))
        while (tmp_path / WRITER_NAME).stat().st_mtime == 0:
            time.sleep(0.01)
