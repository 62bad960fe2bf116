"""Writing a store: rows of tokens with the records of their supervised positions, shard by shard, the manifest last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash

from trl_reasoning_distill.data.files import atomic_write
from trl_reasoning_distill.data.tokenization import row_hash
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store_codec import ENCODINGS, Encoding
from trl_reasoning_distill.teacher.store_shard import shard_path, write_shard

FORMAT = "trl-reasoning-distill/topk-store"
SCHEMA = 1
MANIFEST = "manifest.json"
ROWS = "rows.safetensors"
BLOCK_SIZE = 4096
SHARD_BLOCKS = 128


class TopKStoreWriter:
    """Writes a Top-K store row by row; use it in a `with` block.

    The folder becomes a store when the block ends without an error: `manifest.json` is written last. What a killed run left there
    is replaced.

    Args:
        path: The store's folder.
        top_k: M, places per record.
        temperatures: Temperatures of the records' log-sum-exp, 1.0 among them.
        fingerprint: What made the records, as JSON values: teacher, revision, tokenizer, chat template, versions, …
        encoding: `"compact"` (about 47 bytes per position at M = 25) or `"lossless"` (the float32 bits).
        aligned_to: For an aligned store, what it was aligned to.
        block_size: Positions per block: the unit of reading.
        shard_blocks: Blocks per shard: the unit of a file.

    Raises:
        ValueError: If there is a store already, or an argument cannot be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        top_k: int,
        temperatures: Sequence[float] = (1.0,),
        fingerprint: Mapping[str, Any],
        encoding: Encoding = "compact",
        aligned_to: Mapping[str, Any] | None = None,
        block_size: int = BLOCK_SIZE,
        shard_blocks: int = SHARD_BLOCKS,
    ) -> None:
        self.path = Path(path)
        if (self.path / MANIFEST).exists():
            raise ValueError(f"{self.path} holds a store already. Choose another folder, or remove this one.")
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding is one of {', '.join(ENCODINGS)}, found {encoding!r}.")
        if top_k < 1 or block_size < 1 or shard_blocks < 1:
            raise ValueError(
                f"top_k, block_size and shard_blocks are ≥ 1, found {top_k}, {block_size}, {shard_blocks}."
            )
        self._empty = TopKLogProbs.empty(top_k, temperatures)
        self._fingerprint, self._aligned_to = dict(fingerprint), aligned_to and dict(aligned_to)
        self._encoding: Encoding = encoding
        self._block_size, self._shard_blocks = block_size, shard_blocks
        self._pending: list[TopKLogProbs] = []
        self._pending_positions = 0
        self._shards: list[dict[str, Any]] = []
        self._ids: list[npt.NDArray[np.int32]] = []
        self._supervised: list[npt.NDArray[np.bool_]] = []
        self._counts: list[int] = []
        self._hashes: list[bytes] = []
        for left_over in (self.path / "shards").glob("*"):
            left_over.unlink()

    def add(self, input_ids: Sequence[int], labels: Sequence[int], records: TopKLogProbs) -> None:
        """Add a row and the records of its supervised positions.

        Args:
            input_ids: Token ids of the row.
            labels: The same ids, −100 where the token is not supervised.
            records: One record per supervised position t ≥ 1, in order: the distribution that predicts token t. Position 0 has
                none, since nothing comes before it.

        Raises:
            ValueError: If the numbers do not match, or the records are of another width or temperature.
        """
        ids, label_ids = np.asarray(input_ids, np.int32), np.asarray(labels, np.int32)
        supervised = label_ids != -100
        where = f"row {len(self._counts)}"
        if ids.shape != label_ids.shape or ids.ndim != 1:
            raise ValueError(f"{where}: input_ids and labels differ in length: {ids.shape} and {label_ids.shape}.")
        if (ids[supervised] != label_ids[supervised]).any():
            raise ValueError(
                f"{where}: a label is neither −100 nor the token it stands at; only next-token rows can be stored."
            )
        if len(records) != np.count_nonzero(supervised[1:]):
            raise ValueError(
                f"{where}: {len(records)} records for {np.count_nonzero(supervised[1:])} supervised positions after the first."
            )
        if records.top_k != self._empty.top_k or records.temperatures != self._empty.temperatures:
            raise ValueError(
                f"{where}: records of M = {records.top_k} at {records.temperatures} in a store of M = {self._empty.top_k} at "
                f"{self._empty.temperatures}."
            )
        self._ids.append(ids)
        self._supervised.append(supervised)
        self._counts.append(len(records))
        self._hashes.append(bytes.fromhex(row_hash(ids.tolist(), label_ids.tolist())))
        self._pending.append(records.normalized())
        self._pending_positions += len(records)
        while self._pending_positions >= self._block_size * self._shard_blocks:
            self._flush()

    def _flush(self) -> None:
        """Write the pending records, up to one shard of them."""
        records = TopKLogProbs.concatenate([self._empty, *self._pending])
        size = self._block_size * self._shard_blocks
        path = shard_path(self.path, len(self._shards))
        shard = records.take(slice(0, size))
        self._shards.append(write_shard(path, shard, block_size=self._block_size, encoding=self._encoding))
        self._pending = [records.take(slice(size, None))]
        self._pending_positions = len(self._pending[0])

    def close(self) -> None:
        """Write what is pending, the rows, and then the manifest: now it is a store."""
        if self._pending_positions:
            self._flush()
        rows = self._rows()
        with atomic_write(self.path / ROWS, "wb") as handle:
            handle.write(rows)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "positions": sum(self._counts),
            "rows": len(self._counts),
            "tokens": sum(map(len, self._ids)),
            "top_k": self._empty.top_k,
            "temperatures": list(self._empty.temperatures),
            "encoding": self._encoding,
            "block_size": self._block_size,
            "shard_blocks": self._shard_blocks,
            "fingerprint": self._fingerprint | {"rows": xxhash.xxh3_128_hexdigest(b"".join(self._hashes))},
            "aligned_to": self._aligned_to,
            "rows_file": {"bytes": len(rows), "xxh3": xxhash.xxh3_128_hexdigest(rows)},
            "shards": self._shards,
        }
        with atomic_write(self.path / MANIFEST) as handle:
            handle.write(manifest_text(manifest))

    def _rows(self) -> bytes:
        lengths, counts = np.array([0, *map(len, self._ids)]), np.array([0, *self._counts])
        return safetensors.numpy.save(
            {
                "input_ids": np.concatenate([np.empty(0, np.int32), *self._ids]),
                "supervised": np.concatenate([np.empty(0, np.bool_), *self._supervised]),
                "row_starts": np.cumsum(lengths, dtype=np.int64),
                "record_starts": np.cumsum(counts, dtype=np.int64),
                "hashes": np.frombuffer(b"".join(self._hashes), np.uint8).reshape(
                    len(self._hashes), -1 if self._hashes else 16
                ),
            }
        )

    def __enter__(self) -> TopKStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it stands in the file: with a checksum of its own, in one canonical form."""
    plain = {name: value for name, value in manifest.items() if name != "checksum"}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())
    return json.dumps(plain | {"checksum": checksum}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
