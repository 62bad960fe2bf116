"""Rows come out of every kind of file, exactly as they were written; what is no row is named with its line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.row_files import WrittenFloat, is_row_file, read_rows

ROWS = [{"question": "½ \u2028 of 4?", "answer": "2"}, {"question": "line\x85end\u2029", "answer": "3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("no_last_line_feed.jsonl", LINES.rstrip()),
        ("blank_lines.jsonl", b"\n\n" + LINES.replace(b"\n", b"\n \n")),
        ("bom.jsonl", codecs.BOM_UTF8 + LINES),
        ("utf16.jsonl", LINES.decode().encode("utf-16")),
        ("utf16_big_endian.jsonl", codecs.BOM_UTF16_BE + LINES.decode().encode("utf-16-be")),
        ("utf16_without_a_mark.jsonl", LINES.decode().encode("utf-16-le")),
        ("utf32.jsonl", LINES.decode().encode("utf-32")),
        ("lines_named.json", LINES),
        ("lines_named.csv", LINES),
        ("array.json", json.dumps(ROWS).encode()),
        ("array.jsonl", b" \n" + json.dumps(ROWS, indent=2).encode()),
        ("bom_array.json", codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.jsonl.bz2", bz2.compress(LINES)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("packed_without_saying_so.jsonl", gzip.compress(LINES, mtime=0)),
        ("rows.csv", 'question,answer\n"½ \u2028 of 4?",2\nline\x85end\u2029,3\n'.encode("utf-8-sig")),
        (
            "rows.tsv.gz",
            gzip.compress("question\tanswer\r\n½ \u2028 of 4?\t2\r\nline\x85end\u2029\t3\r\n".encode(), mtime=0),
        ),
    ],
)
def test_rows_of_every_kind_of_file(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert is_row_file(path)
    assert read_rows(path) == ROWS
    assert read_rows(path, 1) == ROWS[:1]


def test_parquet_loses_what_arrow_adds(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"messages": [{"role": "user", "content": "q", "tool_calls": None}], "n": 1}, {"messages": None, "n": 2}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    assert read_rows(path) == [{"messages": [{"role": "user", "content": "q"}], "n": 1}, {"n": 2}]
    (tmp_path / "zstd.jsonl.zst").write_bytes(_zstd(LINES))
    assert read_rows(tmp_path / "zstd.jsonl.zst") == ROWS


def _zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(content))


def test_numbers_keep_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"a": 1180591620717411303424, "b": 0.10, "c": 1e3, "d": 4.0, "e": 4}\n')
    (row,) = read_rows(path)
    assert row["a"] == 2**70
    assert [row[name].written for name in "bcd"] == ["0.10", "1e3", "4.0"]
    assert isinstance(row["b"], WrittenFloat)
    assert row["b"] == 0.1
    assert type(row["e"]) is int


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, line 2: not UTF-8 text"),
        ("a.jsonl", b"\xffabc", "a.jsonl"),
        ("a.jsonl", b"hello\n", "a.jsonl, line 1: not JSON"),
        ("a.json", b'[{"a": 1}, 2]', "a.json, row 2: expected a JSON object, found int"),
        ("a.json", b'[{"a": 1}, ', "a.json: not JSON"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, row 2: more cells than the header has columns"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a whole Parquet file"),
    ],
)
def test_what_is_no_row_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.booleans() | st.none(), min_size=1),
        min_size=1,
        max_size=4,
    ),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    pack=st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress]),
    as_array=st.booleans(),
    escaped=st.booleans(),
)
def test_whatever_json_can_hold_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    encoding: str,
    pack: Callable[[bytes], bytes],
    as_array: bool,
    escaped: bool,
) -> None:
    text = (
        json.dumps(rows, ensure_ascii=escaped)
        if as_array
        else "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    )
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(pack(text.encode(encoding)))
    assert read_rows(path) == rows
