"""The rows of a store: token ids, which of them are supervised, and the text they came from, in one Parquet file.

Parquet packs ids and masks to under two bytes per token, and any tool can read it. Its bytes are checked against the manifest
before it is read. Row groups are the unit of reading; the last few stay in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trl_reasoning_distill.data.files import atomic_write
from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, is_supervised
from trl_reasoning_distill.teacher.store.shard import StoreError, file_hash

ROWS = "rows.parquet"
_GROUP_ROWS = 1024
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "records": pa.int64(),
        "hash": pa.binary(16),
        "example": pa.string(),
    }
)


class RowsWriter:
    """Gathers rows and writes them, atomically, when asked to."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._pending: list[dict[str, Any]] = []
        self.rows = self.tokens = self.records = 0

    def add(
        self,
        input_ids: npt.NDArray[np.int32],
        supervised: npt.NDArray[np.bool_],
        records: int,
        digest: bytes,
        example: Mapping[str, Any] | None,
    ) -> None:
        """Add one row; see the attributes of `StoredRow`."""
        text = None if example is None else json.dumps(example, ensure_ascii=False, sort_keys=True)
        row = {"input_ids": input_ids, "supervised": supervised, "records": records, "hash": digest, "example": text}
        self._pending.append(row)
        self.rows += 1
        self.tokens += len(input_ids)
        self.records += records
        if len(self._pending) == _GROUP_ROWS:
            self._pack()

    def _pack(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._pending, _SCHEMA))
        self._pending = []

    def write(self, store: Path) -> dict[str, Any]:
        """Write the file; returns its entry in the manifest."""
        self._pack()
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, _SCHEMA, compression="zstd") as writer:
            for table in self._tables:
                writer.write_table(table, row_group_size=_GROUP_ROWS)
        with atomic_write(store / ROWS, "wb") as handle:
            handle.write(buffer.getbuffer())
        return {"bytes": buffer.tell(), "xxh3": file_hash(store / ROWS)}


class RowsReader:
    """The rows of a store, read by row group.

    Args:
        store: The store's folder.
        entry: The manifest's entry for the file.

    Raises:
        StoreError: If the file is missing or is not, byte for byte, the one that the manifest names.
    """

    def __init__(self, store: Path, entry: Mapping[str, Any]) -> None:
        file = store / ROWS
        if not file.is_file():
            raise StoreError(
                f"{file} is missing. Copy the store again as a whole, or run the stage that made it again."
            )
        if file.stat().st_size != entry["bytes"] or file_hash(file) != entry["xxh3"]:
            raise StoreError(
                f"{file} does not match its checksum in the manifest: it was cut, edited or damaged, or belongs to another store. "
                f"Copy the store again as a whole."
            )
        self._file = pq.ParquetFile(file, memory_map=True)
        index = self._file.read(columns=["records", "hash"])
        self.starts: npt.NDArray[np.int64] = np.cumsum([0, *index["records"].to_pylist()], dtype=np.int64)
        self.hashes: list[bytes] = index["hash"].to_pylist()
        self._group = lru_cache(maxsize=4)(self._read_group)

    def _read_group(self, number: int) -> pa.Table:
        return self._file.read_row_group(number, use_threads=False)  # a forked worker has no threads of Arrow

    def tokens(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids and supervised mask of a row."""
        group, place = divmod(number, _GROUP_ROWS)
        table = self._group(group)
        ids = table["input_ids"][place].values.to_numpy()
        return ids, table["supervised"][place].values.to_numpy(zero_copy_only=False)

    def example(self, number: int) -> dict[str, Any] | None:
        """The row that the tokens were made from, if it was kept."""
        group, place = divmod(number, _GROUP_ROWS)
        text = self._group(group)["example"][place].as_py()
        return None if text is None else json.loads(text)

    def tables(self) -> Iterator[pa.Table]:
        """`input_ids`, `labels` and `kd_index` of all rows, a row group at a time."""
        first_record = 0
        for number in range(self._file.num_row_groups):
            group = self._file.read_row_group(number, columns=["input_ids", "supervised"]).combine_chunks()
            lists = group["input_ids"].combine_chunks()
            ids = lists.flatten().to_numpy()
            supervised = group["supervised"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            starts = lists.offsets.to_numpy() - lists.offsets[0].as_py()
            has_record = supervised.copy()
            has_record[starts[:-1][np.diff(starts) > 0]] = False  # nothing comes before a row's first token
            numbers = first_record + np.cumsum(has_record) - 1
            first_record += int(has_record.sum())
            columns = {
                "input_ids": ids,
                "labels": np.where(supervised, ids, np.int32(IGNORE_INDEX)),
                "kd_index": np.where(has_record, numbers, -1),
            }
            yield pa.table({name: _lists(starts, values) for name, values in columns.items()})


def _lists(starts: npt.NDArray[np.int32], values: npt.NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))


def as_row(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Token ids and supervised mask of a row, checked.

    Raises:
        ValueError: If the two differ in length, or a label is neither −100 nor the token it stands at.
    """
    ids, label_ids = np.asarray(input_ids, np.int32), np.asarray(labels, np.int32)
    if ids.shape != label_ids.shape or ids.ndim != 1:
        raise ValueError(f"input_ids and labels differ in length: {ids.shape} and {label_ids.shape}.")
    supervised = is_supervised(label_ids)
    if (ids[supervised] != label_ids[supervised]).any():
        raise ValueError("A label is neither −100 nor the token it stands at; only next-token rows can be stored.")
    return ids, supervised
