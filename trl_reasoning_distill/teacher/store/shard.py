"""One shard of a store: a file of compressed blocks behind a header that says where each block lies and what its bytes hash to.

    magic, 8 bytes │ header length, u32 │ header, JSON │ id table │ block 0 │ block 1 │ …

The manifest holds the header's hash, the header holds the hash of the table and of each block: whatever is read has been checked
against the manifest, and nothing has to be read to open a store but the headers.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from trl_reasoning_distill.data.files import atomic_write
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.codec import Encoding, decode_block, encode_block

MAGIC = b"TRDTOPK\x01"
_PREFIX = struct.Struct("<8sI")


class StoreError(ValueError):
    """A store that is incomplete, damaged, foreign, or not made for what is asked of it."""


def shard_path(store: Path, number: int) -> Path:
    """Where shard `number` of a store lies. Names come from numbers, never from a file: a manifest cannot point elsewhere."""
    return store / "shards" / f"{number:05d}.topk"


def write_shard(path: Path, records: TopKLogProbs, *, block_size: int, encoding: Encoding) -> dict[str, Any]:
    """Write a shard atomically.

    Args:
        path: The file.
        records: All records of the shard, normalised.
        block_size: Positions per block.
        encoding: `"compact"` or `"lossless"`.

    Returns:
        The shard's entry in the manifest: positions, bytes, and the hashes of the header and of the whole file.
    """
    table, ranks = rank_ids(records.ids)
    blocks = []
    for start in range(0, len(records), block_size):
        rows = slice(start, start + block_size)
        blocks.append(encode_block(ranks[rows], records.take(rows), encoding))
    packed_table = zstandard.ZstdCompressor(level=3).compress(table.view(np.uint8).reshape(-1, 4).T.tobytes())
    header = json.dumps(
        {
            "positions": len(records),
            "top_k": records.top_k,
            "temperatures": records.temperatures,
            "encoding": encoding,
            "block_size": block_size,
            "log_tail": records.log_tail is not None,
            "table": [len(packed_table), _hash(packed_table)],
            "blocks": [[len(block), _hash(block)] for block in blocks],
        },
        separators=(",", ":"),
    ).encode()
    whole, size = xxhash.xxh3_128(), 0
    with atomic_write(path, "wb") as handle:
        for piece in (_PREFIX.pack(MAGIC, len(header)), header, packed_table, *blocks):
            handle.write(piece)
            whole.update(piece)
            size += len(piece)
    return {"positions": len(records), "bytes": size, "header_xxh3": _hash(header), "xxh3": whole.hexdigest()}


class Shard:
    """A shard opened for reading: memory-mapped, its header checked, its blocks checked when they are read.

    Args:
        path: The file.
        entry: Its entry in the manifest.
        expected: What the manifest says of all shards: `top_k`, `temperatures`, `encoding`, `block_size`.

    Raises:
        StoreError: If the file is missing, cut, longer than written, or not the one that the manifest names.
    """

    def __init__(self, path: Path, entry: dict[str, Any], expected: dict[str, Any]) -> None:
        self.path = path
        if not path.is_file():
            raise StoreError(
                f"{path} is missing. Copy the store again as a whole, or run the stage that made it again."
            )
        found = path.stat().st_size
        if found != entry["bytes"]:
            kind = "cut short" if found < entry["bytes"] else "longer than it was written"
            raise StoreError(
                f"{path} is {kind}: {found:,} bytes, the manifest says {entry['bytes']:,}. Copy the store again as a whole."
            )
        with open(path, "rb") as handle:
            self._map = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        header = self._header(entry, expected)
        self.positions: int = header["positions"]
        sizes = [size for size, _ in header["blocks"]]
        table_bytes, table_hash = header["table"]
        start = _PREFIX.size + self._header_bytes + table_bytes
        self._starts = list(accumulate(sizes, initial=start))
        self._hashes = [digest for _, digest in header["blocks"]]
        if self._starts[-1] != found:
            raise StoreError(f"{path}: the header accounts for {self._starts[-1]:,} bytes of {found:,}. {_DAMAGED}")
        packed = self._checked(start - table_bytes, start, table_hash, "id table")
        planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), np.uint8)
        self.table: npt.NDArray[np.int32] = np.ascontiguousarray(planes.reshape(4, -1).T).view(np.int32).ravel()
        self._layout = header
        self.has_log_tail: bool = header.get("log_tail", False)  # version 0.1.0 kept none

    def _header(self, entry: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
        magic, self._header_bytes = _PREFIX.unpack_from(self._map) if len(self._map) >= _PREFIX.size else (b"", 0)
        if magic[:7] == MAGIC[:7] and magic[7] > MAGIC[7]:
            raise StoreError(
                f"{self.path} has shard format {magic[7]}, this version reads up to {MAGIC[7]}. Upgrade trl-reasoning-distill."
            )
        if magic != MAGIC:
            raise StoreError(f"{self.path} is not a shard of a Top-K store (it begins with {magic!r}). {_DAMAGED}")
        raw = self._checked(_PREFIX.size, _PREFIX.size + self._header_bytes, entry["header_xxh3"], "header")
        header: dict[str, Any] = json.loads(bytes(raw))
        for name, value in expected.items():
            if header[name] != value:
                raise StoreError(f"{self.path} has {name} = {header[name]}, the manifest says {value}. {_DAMAGED}")
        return header

    def _checked(self, start: int, stop: int, digest: str, what: str) -> memoryview:
        data = self._map[start:stop]
        if _hash(data) != digest:
            raise StoreError(
                f"{self.path}: the {what} at bytes {start:,}–{stop:,} does not match its checksum. {_DAMAGED}"
            )
        return data

    def __len__(self) -> int:
        return len(self._hashes)

    def block(self, number: int) -> TopKLogProbs:
        """Check and decode block `number` of this shard."""
        layout = self._layout
        data = self._checked(self._starts[number], self._starts[number + 1], self._hashes[number], f"block {number}")
        return decode_block(
            data,
            self.table,
            positions=min(layout["block_size"], self.positions - number * layout["block_size"]),
            top_k=layout["top_k"],
            temperatures=tuple(layout["temperatures"]),
            encoding=layout["encoding"],
            log_tail=self.has_log_tail,
        )


_DAMAGED = "The file was edited, damaged, or belongs to another store: copy the store again as a whole."


def rank_ids(ids: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """The distinct ids, most frequent first (ties by id), and the place of each id among them."""
    counts = np.bincount(ids.ravel() + 1)  # the missing id is −1
    present = np.flatnonzero(counts)
    table = present[np.argsort(-counts[present], kind="stable")]
    rank_of = np.zeros(len(counts), np.uint32)
    rank_of[table] = np.arange(len(table), dtype=np.uint32)
    return (table - 1).astype(np.int32), rank_of[ids + 1]


def _hash(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def file_hash(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
