"""Where rows come from: a file on this disk, or the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.data.sources.base import Fields, SourceSpec, SourceUnavailableError

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SHUFFLE_BUFFER = 10_000


def local_rows(spec: SourceSpec, split: str, data_dir: str) -> Sequence[Fields]:
    """The rows of a named source's local copy.

    Raises:
        SourceUnavailableError: If there is none.
    """
    path = Path(data_dir) / spec.splits[split].file
    if not path.is_file():
        raise SourceUnavailableError(
            f"data_dir has no copy of {spec.name}'s {split} split: no file {path}. "
            f"Put it there, or leave data_dir out to read {spec.hub_id} from the hub."
        )
    return file_rows(path)


def file_rows(path: Path) -> Sequence[Fields]:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file."""
    if path.suffix == ".jsonl":
        return list(read_jsonl(path))
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows.")
        return rows
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))
    if path.suffix == ".parquet":
        from datasets import Dataset

        return _Rows(Dataset.from_parquet(str(path)))
    raise ValueError(f"{path} is neither {', '.join(FILE_SUFFIXES[:-1])} nor {FILE_SUFFIXES[-1]}.")


def spec_rows(spec: SourceSpec, split: str, seed: int, *, sampled: bool) -> Iterable[Fields]:
    """The rows of a named source on the hub."""
    where = spec.splits[split]
    return hub_rows(
        where.hub_id or spec.hub_id,
        where.hub_split,
        seed,
        config=None if where.hub_id else spec.config,
        revision=None if where.hub_id else spec.revision,
        streaming=spec.streaming,
        sampled=sampled,
    )


def hub_rows(
    hub_id: str,
    split: str,
    seed: int,
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    sampled: bool = True,
) -> Iterable[Fields]:
    """The rows of a hub dataset.

    Args:
        hub_id: Its name.
        split: The hub's name of the split.
        seed: Of a stream's order.
        config: The dataset's configuration.
        revision: The dataset's revision.
        streaming: Fetch rows as they are asked for, in an order that `seed` draws if only some of them are wanted.
        sampled: Whether only some of them are wanted.

    Raises:
        SourceUnavailableError: If they cannot be had.
    """
    import datasets

    options = {"revision": revision} if revision else {}
    try:
        rows = datasets.load_dataset(hub_id, config, split=split, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceUnavailableError(
            f"Cannot read the {split} split of {hub_id} from the hub: {reason}. Check the name and the network, "
            "or give a local copy with data_dir (named sources) or path (jsonl)."
        ) from error
    if not streaming:
        return _Rows(rows)
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) if sampled else rows


class _Rows(Sequence[Fields]):
    """A `datasets.Dataset`, which is not registered as the `Sequence` that it is."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __iter__(self) -> Any:
        return iter(self._dataset)  # reads in blocks, many times faster than row by row
