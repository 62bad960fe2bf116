"""Open a finished store: records by number, rows, and whether it was made for these tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, is_supervised, row_hash, supervised_positions
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.rows import ROWS, RowsReader
from trl_reasoning_distill.teacher.store.shard import Shard, StoreError, file_hash, shard_path
from trl_reasoning_distill.teacher.store.writing import FORMAT, MANIFEST, SCHEMA, manifest_text

if TYPE_CHECKING:
    from datasets import Dataset

_Rows: TypeAlias = slice | npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """A row of tokens in the store.

    Attributes:
        input_ids: `(tokens,)` int32.
        labels: `(tokens,)` int32, −100 where the token is not supervised.
        offset: Number of its first record.
        count: Its records: supervised positions t ≥ 1.
        hash: `data.tokenization.row_hash` of the two.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    offset: int
    count: int
    hash: str

    @property
    def kd_index(self) -> npt.NDArray[np.int64]:
        """`(tokens,)` int64: the number of each token's record, −1 where it has none."""
        index = np.full(len(self.input_ids), -1, np.int64)
        index[1:][is_supervised(self.labels[1:])] = np.arange(self.offset, self.offset + self.count)
        return index


class TopKStore:
    """A Top-K store opened for reading. Make one with `TopKStore.open`.

    Opening reads the manifest, the rows' index and the shards' headers; blocks are memory-mapped, checked against their checksum and
    decoded when a position in them is read, and the last few stay in memory.

    Attributes:
        path: The store's folder.
        manifest: What made it and how it is laid out.
        temperatures: Temperatures that can be asked of its records.
        top_k: M, places per record.
        has_log_tail: Whether its records know their tails (see `TopKLogProbs.log_tail`); those of version 0.1.0 do not.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], cache_blocks: int) -> None:
        self.path, self.manifest = path, manifest
        self.top_k: int = manifest["top_k"]
        self.temperatures: tuple[float, ...] = tuple(manifest["temperatures"])
        expected = {name: manifest[name] for name in ("top_k", "temperatures", "encoding", "block_size")}
        self._shards = [
            Shard(shard_path(path, number), entry, expected) for number, entry in enumerate(manifest["shards"])
        ]
        self.has_log_tail = all(shard.has_log_tail for shard in self._shards)
        self._cache: OrderedDict[int, TopKLogProbs] = OrderedDict()
        self._cache_blocks = cache_blocks
        self._rows = RowsReader(path, manifest["rows_file"])

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, cache_blocks: int = 64) -> TopKStore:
        """Open a store.

        Args:
            path: The store's folder, or the folder of the stage that made it (with the store in `store/`).
            cache_blocks: Decoded blocks kept in memory; each takes `block_size × M × 8` bytes, 0.8 MB at M = 25.

        Raises:
            StoreError: If it is not a store, is not finished, is damaged, or was written by a newer version.
        """
        path = Path(path)
        if not (path / "shards").is_dir() and (path / "store" / MANIFEST).is_file():
            path = path / "store"
        return cls(path, _read_manifest(path), max(1, cache_blocks))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._cache_blocks)  # a worker process maps the files itself

    def __len__(self) -> int:
        """Positions: records in the store."""
        return int(self.manifest["positions"])

    @property
    def rows(self) -> int:
        """Rows of tokens in the store."""
        return int(self.manifest["rows"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What made the records: teacher, revision, tokenizer, chat template, versions, …"""
        return dict(self.manifest["fingerprint"])

    @property
    def tokenizer_name(self) -> str:
        """Folder or hub name of the tokenizer that the rows were made with: the teacher's. Empty if the store does not say."""
        made_with = self.manifest["fingerprint"]
        return str(made_with.get("tokenizer_name") or made_with.get("teacher") or "")

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The tokenizer whose ids the store holds: the student's once aligned, the teacher's before."""
        made_for = self.manifest["aligned_to"] or self.manifest["fingerprint"]
        return made_for.get("tokenizer")

    def read(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> TopKLogProbs:
        """The records with the given numbers, in that order.

        Args:
            indices: `(n,)` integers in `[0, len(store))`.

        Raises:
            IndexError: If a number is out of range.
            StoreError: If a block that is needed is damaged.
        """
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if not len(wanted):
            return TopKLogProbs.empty(self.top_k, self.temperatures)
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"{self.path} has records 0–{len(self) - 1}, asked for {wanted.min()}–{wanted.max()}.")
        out = TopKLogProbs(
            np.empty((len(wanted), self.top_k), np.int32),
            np.empty((len(wanted), self.top_k), np.float32),
            np.empty((len(wanted), len(self.temperatures)), np.float32),
            self.temperatures,
            np.empty((len(wanted), len(self.temperatures)), np.float32) if self.has_log_tail else None,
        )
        for number, rows, places in self._by_block(wanted):
            block = self._block(number)
            out.ids[rows], out.log_probs[rows] = block.ids[places], block.log_probs[places]
            out.log_sum_exp[rows] = block.log_sum_exp[places]
            if out.log_tail is not None and block.log_tail is not None:
                out.log_tail[rows] = block.log_tail[places]
        return out

    def teacher_mass(self, top_k: int, temperature: float, *, positions: int = 10_000) -> float:
        """Mean mass that the teacher gives its Top-K tokens at a temperature: how much of it a loss on these tokens sees.

        A large vocabulary flattens fast: of SmolLM2-135M's mass on GSM8K, ten tokens have 0.95 at T = 1, 0.36 at T = 2.

        Args:
            top_k: K, at most M.
            temperature: One of `temperatures`.
            positions: Records that are read for it, evenly spread over the store.

        Raises:
            ValueError: If K is not in 1–M, the temperature was not captured, or the store is empty.
        """
        if not 1 <= top_k <= self.top_k:
            raise ValueError(
                f"{self.path} holds {self.top_k} tokens per position: K = {top_k} is not among 1–{self.top_k}."
            )
        if not len(self):
            raise ValueError(f"{self.path} holds no record: there is no mass to measure.")
        numbers = np.arange(len(self))
        if len(self) > positions:  # a run of each block, since a block is decoded as a whole
            runs = -(-len(self) // int(self.manifest["block_size"]))
            length = max(1, positions // runs)
            starts = np.linspace(0, len(self) - length, runs).astype(np.int64)
            numbers = (starts[:, None] + np.arange(length)).ravel()
        records = self.read(numbers)
        return float(np.exp(records.at_temperature(temperature)[:, :top_k].astype(np.float64)).sum(axis=1).mean())

    def _by_block(self, wanted: npt.NDArray[np.int64]) -> Iterator[tuple[int, _Rows, _Rows]]:
        """Per block: its number, which of the wanted records it holds, and where; as slices if the wanted ones follow each other."""
        size = int(self.manifest["block_size"])
        first, last = int(wanted[0]), int(wanted[-1])
        if last - first == len(wanted) - 1 and (wanted[1:] - wanted[:-1] == 1).all():
            for number in range(first // size, last // size + 1):
                start, stop = max(first, number * size), min(last + 1, (number + 1) * size)
                yield number, slice(start - first, stop - first), slice(start - number * size, stop - number * size)
            return
        block_of, place = np.divmod(wanted, size)
        for number in np.unique(block_of):
            rows = np.flatnonzero(block_of == number)
            yield int(number), rows, place[rows]

    def _block(self, number: int) -> TopKLogProbs:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        shard, place = divmod(number, self.manifest["shard_blocks"])
        block = self._cache[number] = self._shards[shard].block(place)
        if len(self._cache) > self._cache_blocks:
            self._cache.popitem(last=False)
        return block

    def row(self, number: int) -> StoredRow:
        """Row `number` of tokens.

        Raises:
            IndexError: If there is no such row.
        """
        if not 0 <= number < self.rows:
            raise IndexError(f"{self.path} has rows 0–{self.rows - 1}, asked for {number}.")
        ids, supervised = self._rows.tokens(number)
        first, last = (int(at) for at in self._rows.starts[number : number + 2])
        labels = np.where(supervised, ids, np.int32(IGNORE_INDEX))
        return StoredRow(ids, labels, first, last - first, self._rows.hashes[number].hex())

    def example(self, number: int) -> dict[str, Any] | None:
        """The row of text that row `number` was made from, if the store keeps it."""
        return self._rows.example(number)

    def __iter__(self) -> Iterator[StoredRow]:
        """All rows in order."""
        return map(self.row, range(self.rows))

    @cached_property
    def _number_of_hash(self) -> dict[bytes, int]:
        return {digest: number for number, digest in reversed(list(enumerate(self._rows.hashes)))}

    def find_row(self, digest: str) -> int | None:
        """The first row with that `row_hash`, or None."""
        return self._number_of_hash.get(bytes.fromhex(digest))

    def dataset(self) -> Dataset:
        """The rows as a dataset of `input_ids`, `labels` and `kd_index`, ready to train on."""
        import pyarrow as pa
        from datasets import Dataset

        if not self.rows:
            raise StoreError(f"{self.path} holds no row: there is nothing to train on.")
        return Dataset(pa.concat_tables(self._rows.tables()))

    def differences(self, expected: Mapping[str, Any]) -> list[str]:
        """What of `expected` this store was not made with, in words.

        Args:
            expected: Values by fingerprint key, such as `tokenizer`, `chat_template`, `teacher`, `dtype`.
        """
        found = self.fingerprint | (self.manifest["aligned_to"] or {})  # an aligned store is made for the student
        return [
            f"{name} is {found.get(name)!r} in the store, {value!r} here"
            for name, value in expected.items()
            if found.get(name) != value
        ]

    def check_compatible(self, expected: Mapping[str, Any], *, remedy: str = "Capture or align it for these.") -> None:
        """Refuse a store that was not made for these tokens.

        Args:
            expected: As for `differences`.
            remedy: What the user can do, for the message.

        Raises:
            StoreError: Naming each difference.
        """
        if different := self.differences(expected):
            raise StoreError(f"The store at {self.path} was not made for this: {'; '.join(different)}. {remedy}")

    def verify(self) -> Iterator[str]:
        """Check every byte and every row, yielding a line for each part that is right.

        Raises:
            StoreError: At the first part that is wrong.
        """
        for number, entry in enumerate(self.manifest["shards"]):
            file = shard_path(self.path, number)
            if file_hash(file) != entry["xxh3"]:
                raise StoreError(
                    f"{file} does not match its checksum in the manifest. Copy the store again as a whole."
                )
            for block in range(len(self._shards[number])):
                self._shards[number].block(block)
            yield f"{file.name}: {entry['positions']:,} positions, {entry['bytes']:,} bytes"
        for number, row in enumerate(self):
            supervised = len(supervised_positions(row.labels.tolist()))
            if row_hash(row.input_ids.tolist(), row.labels.tolist()) != row.hash or supervised != row.count:
                raise StoreError(f"{self.path / ROWS}: row {number} does not match its hash. Capture it again.")
        digest = xxhash.xxh3_128_hexdigest(b"".join(self._rows.hashes))
        if digest != self.manifest["fingerprint"]["rows"] or self._rows.starts[-1] != len(self):
            raise StoreError(f"{self.path / ROWS} belongs to another store: its rows hash to {digest}.")
        yield f"{ROWS}: {self.rows:,} rows, {self.manifest['tokens']:,} tokens"


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, once it is known to be one, whole, and not newer than this code."""
    file = path / MANIFEST
    if not file.is_file():
        unfinished = (path / "shards").is_dir()
        raise StoreError(
            f"{path} holds {'an unfinished' if unfinished else 'no'} Top-K store: {file} is missing. "
            + (
                "Run the stage that writes it again: it goes on where it stopped."
                if unfinished
                else "Is the path right?"
            )
        )
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise TypeError
    except (ValueError, TypeError):  # not UTF-8, not JSON, not an object
        raise StoreError(
            f"{file} is damaged: it is not the JSON of a manifest. Copy the store again as a whole."
        ) from None
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{file} is not the manifest of a Top-K store: format is {manifest.get('format')!r}.")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}. Upgrade trl-reasoning-distill."
        )
    if manifest_text(manifest) != text:
        raise StoreError(
            f"{file} was edited or damaged: it does not match its own checksum. Copy the store again as a whole."
        )
    positions = sum(entry["positions"] for entry in manifest["shards"])
    if positions != manifest["positions"]:
        raise StoreError(f"{file} names shards of {positions:,} positions for {manifest['positions']:,}.")
    return manifest


def _reopen(path: Path, cache_blocks: int) -> TopKStore:
    return TopKStore.open(path, cache_blocks=cache_blocks)
