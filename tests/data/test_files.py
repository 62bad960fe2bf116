"""Files are whole or not there, and a torn last line costs only itself."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trl_reasoning_distill.data.files import (
    DiskFullError,
    append_jsonl,
    atomic_write,
    explain_full_disk,
    hash_path,
    read_json,
    read_jsonl,
    read_jsonl_prefix,
    write_json,
    write_jsonl,
)
from trl_reasoning_distill.data.manifest import StageRun

ROWS = [{"a": 1, "text": "é\u2028π"}, {"a": None, "text": "two\nlines"}]


def test_atomic_write_shows_nothing_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as handle:
        handle.write("whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path, "wb") as handle:  # noqa: PT012  the error must come from inside
        handle.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as handle:
        handle.write("")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_atomic_write_refuses_other_modes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a'"), atomic_write(tmp_path / "a", "a"):
        pass


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, None, 2.5]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None, 2.5]}
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "b.json").write_text('{\n"a": \n}')
    with pytest.raises(ValueError, match=r"b\.json, line 3: not JSON"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"c\.json: not UTF-8"):
        read_json(tmp_path / "c.json")


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    row = {"output": "cut \ud83d"}
    write_jsonl(tmp_path / "a.jsonl", [row])
    append_jsonl(tmp_path / "a.jsonl", [row])
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [row, row]


def test_jsonl_round_trip(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "a.jsonl", iter(ROWS)) == 2
    assert list(read_jsonl(tmp_path / "a.jsonl")) == ROWS
    assert append_jsonl(tmp_path / "a.jsonl", ROWS[:1]) == 1
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [*ROWS, ROWS[0]]


@pytest.mark.parametrize(
    ("line", "what"), [("{oops}", "not JSON"), ("[1]", "expected a JSON object, found list"), ("\xff", "not JSON")]
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: {what}"):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]
    whole = b"".join(lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = ROWS[: (cut >= len(lines[0])) + (cut >= len(whole))]
        assert read_jsonl_prefix(path) == expected
        append_jsonl(path, [{"next": cut}])
        assert list(read_jsonl(path)) == [*expected, {"next": cut}]


def test_the_prefix_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_jsonl_prefix(tmp_path / "none.jsonl") == []
    assert os.listdir(tmp_path) == []


def test_damage_before_the_last_line_is_no_torn_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 3}')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl_prefix(tmp_path / "a.jsonl")


def test_the_hash_of_a_folder_is_that_of_its_names_and_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for name, content in {"a.txt": "1", "sub/b.txt": "2"}.items():
            with atomic_write(tmp_path / folder / name) as handle:
                handle.write(content)
    one, two = tmp_path / "one", tmp_path / "two"
    first = hash_path(one)
    assert len(first) == 32
    assert hash_path(two) == first
    (two / ".hidden").write_text("x")
    (two / "manifest.json").write_text("x")
    assert hash_path(two, exclude={"manifest.json"}) == first
    assert hash_path(two) != first
    (one / "a.txt").write_text("12")
    (one / "sub" / "b.txt").write_text("")
    assert hash_path(one) != first


def test_the_hash_of_a_renamed_file_in_a_folder_differs(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = hash_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_path(tmp_path) != before


def test_nothing_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_path(tmp_path / "none")


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
