"""Output folders: one writer at a time, nothing removed that was not made here, and no output where an input lies."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import psutil

LOCK_NAME, WRITER_NAME = ".lock", ".writer.json"
BEAT_SECONDS = 15.0
SILENCE_SECONDS = 4 * BEAT_SECONDS
"""A writer on another machine that has given no sign of life for so long is taken for dead."""


class FolderInUseError(ValueError):
    """Another process writes into the folder; the message names it."""


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, as long as the block lasts.

    The lock of the operating system goes with the process that holds it, however that ends. File systems that machines share do not all
    have such locks, so the writer also leaves its name beside it, `.writer.json`, and renews it every `BEAT_SECONDS`.

    Raises:
        FolderInUseError: If another process writes into it, with its machine, process and start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = filelock.FileLock(folder / LOCK_NAME, timeout=0), folder / WRITER_NAME
    try:
        lock.acquire()
    except filelock.Timeout:
        raise FolderInUseError(_describe(folder, _read(note))) from None
    try:
        _wait_for_the_dead(folder, note)
        note.write_text(json.dumps(_this_process()), encoding="utf-8")
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(note, ended), name="one_writer", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            note.unlink(missing_ok=True)
    finally:
        (folder / LOCK_NAME).unlink(
            missing_ok=True
        )  # while it is held: who opened it meanwhile sees that it has no name
        lock.release()


def check_apart(output: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse an output folder that is an input, or holds one, or lies in one: what is read would be written over.

    Args:
        output: The folder.
        inputs: Name to path or hub id; what is not on this disk is passed over.

    Raises:
        ValueError: With the input.
    """
    out = output.resolve()
    for name, value in inputs.items():
        path = Path(value)
        if not path.exists():
            continue
        path = path.resolve()
        if path == out or path.is_relative_to(out) or (path.is_dir() and out.is_relative_to(path)):
            how = "is" if path == out else "holds" if path.is_relative_to(out) else "lies in"
            raise ValueError(f"The output folder {output} {how} an input, {name} = {value}. Give another output_dir.")


def files_of(folder: Path, without: Iterable[str] = ()) -> list[str]:
    """The files below a folder, relative to it, sorted; but for hidden ones at its top, and what lies at or below `without`."""
    left_out = set(without)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return [
        path.as_posix()
        for path in paths
        if path.parts[0] not in (LOCK_NAME, WRITER_NAME) and not left_out & {path.as_posix(), path.parts[0]}
    ]


def remove_files(folder: Path, files: Iterable[str]) -> None:
    """Remove files of a folder, and folders below it that are empty then. A link is removed, not what it leads to."""
    root = folder.resolve()
    for name in files:
        path = folder / name
        if path.parent.resolve().is_relative_to(root):  # a manifest may not lead elsewhere
            path.unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    started = datetime.fromtimestamp(process.create_time(), UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": process.pid, "started": started}


def _read(note: Path) -> dict[str, Any]:
    """Who says that it writes; empty if nobody does, or the note was cut by a kill."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait_for_the_dead(folder: Path, note: Path) -> None:
    """Return when the writer that the note names is dead; one on another machine is given time for a sign of life."""
    writer, last = _read(note), _age(note)
    while writer and not _is_dead(writer, last):
        now = _age(note)
        if writer.get("host") == socket.gethostname() or now < last:
            raise FolderInUseError(_describe(folder, writer))
        last = now
        time.sleep(min(1.0, BEAT_SECONDS))


def _is_dead(writer: Mapping[str, Any], silent: float) -> bool:
    if writer.get("host") != socket.gethostname():
        return silent > SILENCE_SECONDS
    if writer.get("pid") == os.getpid():
        return True  # an earlier run in this very process
    try:
        process = psutil.Process(int(writer["pid"]))
        started, has_ended = process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return True
    return has_ended or datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds") != writer.get("started")


def _age(note: Path) -> float:
    try:
        return time.time() - note.stat().st_mtime
    except OSError:
        return float("inf")


def _beat(note: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(note)


def _describe(folder: Path, writer: Mapping[str, Any]) -> str:
    who = "Another process"
    if writer:
        who = f"Process {writer.get('pid')} on {writer.get('host')}, started {writer.get('started')},"
    return f"{who} is writing into {folder}. Wait until it ends, stop it, or give another output_dir."
