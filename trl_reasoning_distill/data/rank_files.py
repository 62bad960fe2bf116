"""Rows that many ranks append, all may read after a kill, and one merges: `NAME.rank0.jsonl`, … to `NAME.jsonl`.

A stage that makes rows one by one owns a `RankFiles`. Each rank appends to its own file, so no two processes write to one.
On the next start the rows of *all* files count as done, whatever the number of ranks was; a line torn by the kill is dropped
and made anew. `merge` writes the final file in a given order, atomically, and then removes the rank files; a kill between
the two leaves both, and equal rows twice are one row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from trl_reasoning_distill.data.files import append_jsonl, read_jsonl, read_jsonl_prefix, write_jsonl

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]


class RankFiles(Generic[Key]):
    """The rows of one stage under construction.

    Args:
        path: The final file, such as `runs/x/generate/traces.jsonl`.
        key: What makes a row the same row, such as its problem and sample.
        rank: Number of this process.
    """

    def __init__(self, path: str | os.PathLike[str], key: Callable[[Mapping[str, Any]], Key], rank: int = 0) -> None:
        self.path = Path(path)
        self.key = key
        self.own_path = self._rank_path(str(rank))

    def repair(self) -> None:
        """Drop lines that a kill has torn. To be called by one rank, before any rank reads."""
        for path in self._rank_paths():
            read_jsonl_prefix(path)

    def read(self) -> dict[Key, Row]:
        """All rows made so far, by any rank, in this run or an earlier one."""
        paths = [path for path in (self.path, *self._rank_paths()) if path.exists()]
        return {self.key(row): row for path in paths for row in read_jsonl(path)}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to this rank's file and flush them to the disk."""
        append_jsonl(self.own_path, rows)

    def merge(self, order: Iterable[Key]) -> list[Row]:
        """Write the final file and remove the rank files. To be called by one rank, after all have ended.

        Args:
            order: Keys in the order of the final file; rows that it does not name are left out, and keys without a row too.

        Returns:
            The rows of the final file.
        """
        rows = self.read()
        ordered = [rows[key] for key in order if key in rows]
        write_jsonl(self.path, ordered)
        for path in self._rank_paths():
            path.unlink()
        return ordered

    def _rank_path(self, rank: str) -> Path:
        return self.path.with_suffix(f".rank{rank}{self.path.suffix}")

    def _rank_paths(self) -> list[Path]:
        return sorted(self.path.parent.glob(self._rank_path("*").name))
