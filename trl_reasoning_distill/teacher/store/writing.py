"""Writing a store: rows of tokens with the records of their supervised positions, shard by shard, the manifest last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from trl_reasoning_distill.data.files import atomic_write, remove_torn
from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, row_hash
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.codec import ENCODINGS, Encoding
from trl_reasoning_distill.teacher.store.rows import RowsWriter, as_row
from trl_reasoning_distill.teacher.store.shard import shard_path, write_shard

FORMAT = "trl-reasoning-distill/topk-store"
SCHEMA = 1
MANIFEST = "manifest.json"
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
        encoding: `"compact"` (about 44 bytes per position at M = 25) or `"lossless"` (the float32 bits).
        aligned_to: For an aligned store, what it was aligned to; may be set until the block ends.
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
        self._fingerprint = dict(fingerprint)
        self.aligned_to = aligned_to
        self._encoding: Encoding = encoding
        self._block_size, self._shard_blocks = block_size, shard_blocks
        self._pending: list[TopKLogProbs] = []
        self._pending_positions = 0
        self._shards: list[dict[str, Any]] = []
        self._rows = RowsWriter()
        self._row_hashes = xxhash.xxh3_128()
        remove_torn(self.path)
        for left_over in (self.path / "shards").glob("*"):
            left_over.unlink()

    def add(
        self,
        input_ids: Sequence[int],
        labels: Sequence[int],
        records: TopKLogProbs,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a row and the records of its supervised positions.

        Args:
            input_ids: Token ids of the row.
            labels: The same ids, −100 where the token is not supervised.
            records: One record per supervised position t ≥ 1, in order: the distribution that predicts token t. Position 0 has
                none, since nothing comes before it.
            example: The row of text that the tokens were made from; alignment to another tokenizer needs it.

        Raises:
            ValueError: If the numbers do not match, or the records are of another width or temperature.
        """
        where = f"Row {self._rows.rows}"
        try:
            ids, supervised = as_row(input_ids, labels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(records) != np.count_nonzero(supervised[1:]):
            raise ValueError(
                f"{where}: {len(records)} records for {np.count_nonzero(supervised[1:])} supervised positions after the first."
            )
        if records.top_k != self._empty.top_k or records.temperatures != self._empty.temperatures:
            raise ValueError(
                f"{where}: records of M = {records.top_k} at {records.temperatures} in a store of M = {self._empty.top_k} at "
                f"{self._empty.temperatures}."
            )
        digest = bytes.fromhex(row_hash(ids.tolist(), np.where(supervised, ids, IGNORE_INDEX).tolist()))
        self._row_hashes.update(digest)
        self._rows.add(ids, supervised, len(records), digest, example)
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
        rows_file = self._rows.write(self.path)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "positions": self._rows.records,
            "rows": self._rows.rows,
            "tokens": self._rows.tokens,
            "top_k": self._empty.top_k,
            "temperatures": list(self._empty.temperatures),
            "encoding": self._encoding,
            "block_size": self._block_size,
            "shard_blocks": self._shard_blocks,
            "fingerprint": self._fingerprint | {"rows": self._row_hashes.hexdigest()},
            "aligned_to": self.aligned_to and dict(self.aligned_to),
            "rows_file": rows_file,
            "shards": self._shards,
        }
        with atomic_write(self.path / MANIFEST) as handle:
            handle.write(manifest_text(manifest))

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
