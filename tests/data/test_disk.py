"""A full disk is told in many words; all of them become one error, and no other error does."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trl_reasoning_distill.data.disk import DiskFullError, explain_full_disk
from trl_reasoning_distill.data.files import append_jsonl, read_jsonl_prefix, write_json
from trl_reasoning_distill.data.manifest import StageRun

LIMIT = 20_000


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file may grow beyond `LIMIT` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_tensor(path: Path) -> None:
    import torch

    torch.save(torch.zeros(LIMIT), path)


def save_safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(LIMIT)}, path)


def save_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": np.random.default_rng(0).random(LIMIT)}), path)


@pytest.mark.parametrize(
    "write", [save_tensor, save_safetensors, save_parquet, lambda path: path.write_bytes(bytes(2 * LIMIT))]
)
def test_whoever_writes_it_is_one_error(tmp_path: Path, file_limit: None, write) -> None:
    with pytest.raises(DiskFullError, match=rf"^A file for {tmp_path} could not be written: .* MB free at"):  # noqa: SIM117
        with StageRun("sft", tmp_path, {}):
            write(tmp_path / "file")


def test_our_own_files_are_named(tmp_path: Path, file_limit: None) -> None:
    rows = [{"text": "x" * 1000}] * 30
    with pytest.raises(DiskFullError, match=r"/rows\.jsonl could not be written: files may not grow so large here"):  # noqa: SIM117
        with StageRun("generate", tmp_path, {}):
            append_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl_prefix(tmp_path / "rows.jsonl") == rows[:19]
    with pytest.raises(OSError, match=r"File too large: .*/whole\.json"):
        write_json(tmp_path / "whole.json", rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "run.json"]


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota on this disk is used up")]
)
def test_reasons(tmp_path: Path, number: int, reason: str) -> None:
    try:
        try:
            raise OSError(number, "words of the system", str(tmp_path / "file"))
        except OSError:
            raise RuntimeError("saving failed")  # noqa: B904
    except RuntimeError as error:
        text = str(explain_full_disk(error, tmp_path, lambda: "All is kept."))
    assert text.startswith(f"{tmp_path}/file could not be written: {reason} (")
    assert "All is kept. Make room" in text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "no"),
        ValueError("(os error 2)"),
        RuntimeError("PytorchStreamReader failed"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    assert explain_full_disk(error, tmp_path) is None
    with pytest.raises(type(error)), StageRun("sft", tmp_path, {}):
        raise error
