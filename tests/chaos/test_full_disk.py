"""A disk that is full: one line says so, nothing that was made is lost, and with room the same command ends as in peace."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.chaos.conftest import Road
from tests.chaos.harness import LOG, OUTPUT, Stage, finish, start

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def stop_for_want_of_room(stage: Stage, folder: Path, file_limit: int | None = None) -> str:
    """Run a stage that must stop with one line; returns the line."""
    (process,) = start(stage, folder, file_limit=file_limit)
    process.join()
    *_, line = (folder / LOG).read_text().splitlines()
    assert process.exitcode == 1, line
    assert "Traceback" not in (folder / LOG).read_text()
    assert line.startswith("error: ")
    assert "MB free at" in line
    assert line.endswith(
        "Make room, or move out to another disk and give its new place as output_dir. Then go on with: the same command again"
    )
    return line


@pytest.mark.parametrize(
    ("name", "limit", "file"),
    [
        ("generate", 4_000, "out/traces.rank0.jsonl"),
        ("capture", 4_000, "out/store/shards/00000.topk"),
        ("evaluate", 3_000, "out/predictions.rank0.jsonl"),
    ],
)
def test_limit_for_files(road: Road, tmp_path: Path, name: str, limit: int, file: str) -> None:
    stage, whole = road(name)
    line = stop_for_want_of_room(stage, tmp_path, file_limit=limit)
    assert f"error: {file} could not be written: files may not grow so large here" in line
    assert finish(stage, tmp_path).contents == whole.contents


def test_disk_without_room_for_a_third_checkpoint(road: Road, tmp_path: Path) -> None:
    stage, whole = road("sft")
    output = tmp_path / OUTPUT
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=25m", "none", str(output)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        line = stop_for_want_of_room(stage, tmp_path)
        assert "The newest whole checkpoint is out/checkpoint-2." in line
        subprocess.run(["mount", "-o", "remount,size=100m", str(output)], check=True)
        assert finish(stage, tmp_path).contents == whole.contents
        log = (tmp_path / LOG).read_text()
        assert "sft: skipped out/checkpoint-3: it has no checkpoint_manifest.json" in log
        assert "sft: going on from out/checkpoint-2" in log
    finally:
        subprocess.run(["umount", str(output)], check=True)
