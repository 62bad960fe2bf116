"""Rows out of the files that people have: JSON Lines, a JSON array, CSV, Parquet; compressed or not, in any Unicode encoding.

What a file is, its bytes say: the name counts only for CSV. Numbers keep the text they were written with.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PEEKED = 4096
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark its own begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class WrittenFloat(float):
    """A number with a point or an exponent, and its text in the file: `0.10` is not written again as `0.1`."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number


def is_row_file(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a file of rows, compressed or not."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix in FILE_SUFFIXES


def read_rows(path: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """The rows of a file, or the first `limit` of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as rows, with the file and the line or row.
    """
    path = Path(path)
    try:
        with _open(path) as handle:
            return _rows(path, handle, limit)[:limit]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not {error.encoding} text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}.") from None


def _rows(path: Path, handle: IO[bytes], limit: int | None) -> list[Row]:
    head = handle.peek(_PEEKED)[:_PEEKED]  # type: ignore[attr-defined]
    if head.startswith(b"PAR1"):
        return _parquet_rows(path, handle)
    encoding, is_json = _encoding(head), head.lstrip().startswith((b"{", b"["))
    delimiter = _DELIMITERS.get((path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix)
    if delimiter is not None and not is_json:
        return _csv_rows(path, handle, encoding, delimiter)
    if encoding == "utf-8" and head.lstrip().startswith(b"{"):
        return list(islice(_json_lines(path, handle), limit))
    text = handle.read().decode(encoding)
    if text.lstrip().startswith("["):
        return _checked(path, _parse(text, f"{path}"))
    return list(islice(_json_lines(path, io.BytesIO(text.encode("utf-8", "surrogatepass"))), limit))


def parse_json(text: str | bytes) -> Any:
    """JSON with every number as it was written: whole ones exact, others a `WrittenFloat`."""
    return json.loads(text, parse_float=WrittenFloat)


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    with open(path, "rb") as handle:
        magic = handle.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(path))
    if magic.startswith(b"BZh"):
        return io.BufferedReader(bz2.open(path))
    if magic == b"\xfd7zXZ\x00":
        return io.BufferedReader(lzma.open(path))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        if importlib.util.find_spec("zstandard") is None:
            raise ValueError(f"{path} is compressed with Zstandard: pip install zstandard, or unpack it first.")
        import zstandard

        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")


def _encoding(head: bytes) -> str:
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if len(head) > 3 and 0 in head[:4]:  # UTF-16 without its mark: every other byte of ASCII is 0
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8"


def _json_lines(path: Path, handle: IO[bytes]) -> Iterator[Row]:
    """Rows one by one, or those of one object over several lines. Only a line feed ends a line: U+2028 is text."""
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
            ) from None
        except (ValueError, RecursionError) as error:
            if number == 1:  # perhaps an object that is written over many lines
                yield from _checked(path, _parse(line + handle.read(), f"{path}, line 1", str(error)))
                return
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
        yield row


def _parse(text: str | bytes, where: str, reason: str | None = None) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({reason or error}).") from None


def _checked(path: Path, value: Any) -> list[Row]:
    """The rows of a JSON value: a list, an object that holds one list of rows, or a single row."""
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        is_wrapper = len(lists) == 1 and not {"messages", "conversations", "prompt", "completion"} & value.keys()
        value = lists[0] if is_wrapper else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a list of rows.")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, found {type(row).__name__}.")
    return value


def _csv_rows(path: Path, handle: IO[bytes], encoding: str, delimiter: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a chain of thought is longer than the module's default
    rows: list[Row] = []
    with io.TextIOWrapper(handle, encoding=encoding, newline="") as text:
        try:
            for number, row in enumerate(csv.DictReader(text, delimiter=delimiter), start=1):
                if None in row:
                    raise ValueError(f"{path}, row {number}: more cells than the header has columns.")
                rows.append({name: value or None for name, value in row.items()})
        except csv.Error as error:
            raise ValueError(f"{path}, row {len(rows) + 1}: not CSV ({error}).") from None
    return rows


def _parquet_rows(path: Path, handle: IO[bytes]) -> list[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(handle)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}.") from None
    return [without_nulls(row) for row in table.to_pylist()]


def without_nulls(value: Any) -> Any:
    """A value without the keys that Arrow adds to objects because others of the column have them."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return (
        [without_nulls(item) for item in value]
        if isinstance(value, Sequence) and not isinstance(value, str | bytes)
        else value
    )
