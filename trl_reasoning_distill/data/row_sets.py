"""Sets of rows: read from a file or the hub, and made into a dataset to train on that holds every value exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trl_reasoning_distill.data.conversations import CONVERSATION_COLUMNS
from trl_reasoning_distill.data.normalization import ROW_NUMBER, HostileRowError, Shapes, normalize_rows
from trl_reasoning_distill.data.published import Reading
from trl_reasoning_distill.data.row_files import FILE_SUFFIXES, read_rows, without_nulls

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Rows: TypeAlias = "list[dict[str, Any]] | Dataset"
"""Rows as they are published: of a file, or of a dataset."""


def load_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file, or of `train.jsonl` in a stage's folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds no row.
    """
    file = rows_file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"No training rows at {file}. Give a file of rows ({', '.join(FILE_SUFFIXES)}), or the folder of the verify or select stage."
        )
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"{file} holds no row: there is nothing to train on.")
    return rows


def rows_file(path: str | os.PathLike[str]) -> Path:
    """A file of rows, or `train.jsonl` where `path` is a stage's folder."""
    return Path(path) / "train.jsonl" if Path(path).is_dir() else Path(path)


def to_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as a dataset with a column for every name that any of them has, typed by all of them.

    Messages with more than a role and a content, tools, template variables and whatever is of mixed types is kept as JSON, exactly as it is.
    """
    from datasets import Dataset, Features

    names = dict.fromkeys(name for row in rows for name in row)
    features, columns = {}, {}
    for name in names:
        features[name], columns[name] = _typed([row.get(name) for row in rows])
    return Dataset.from_dict(columns, features=Features(features))


def _typed(values: list[Any]) -> tuple[Any, list[Any]]:
    """The type that holds all of these values exactly, and the values as it takes them."""
    from datasets import Json, List, Value

    held = [value for value in values if value is not None]
    kinds = {type(value) for value in held}
    if kinds <= {str}:
        return Value("string"), values
    if kinds == {bool}:
        return Value("bool"), values
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in held):
        return Value("int64"), values
    if kinds <= {float, int} and not any(isinstance(value, int) for value in held):
        return Value("float64"), values
    if kinds == {list} and all(map(_is_message_list, held)):
        return List({"role": Value("string"), "content": Value("string")}), values
    if kinds == {list} and all(type(item) is int for value in held for item in value):
        return List(Value("int64")), values
    if kinds == {list} and all(isinstance(item, Mapping) for value in held for item in value):
        return List(Json()), [None if value is None else [_json(item) for item in value] for value in values]
    return Json(), [None if value is None else _json(value) for value in values]


def _is_message_list(value: Any) -> bool:
    return all(
        isinstance(item, dict) and item.keys() == {"role", "content"} and isinstance(item["content"], str)
        for item in value
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def load_hub_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """The rows of a dataset on the hub.

    Raises:
        ValueError: If it cannot be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, config, split=split)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is neither here nor to be had from the hub ({reason}).") from None


def number_rows(rows: Rows) -> Rows:
    """Rows that remember their numbers when some of them are drawn."""
    if isinstance(rows, list):
        return [{ROW_NUMBER: number, **row} for number, row in enumerate(rows, start=1)]
    if ROW_NUMBER in rows.column_names:
        return rows
    return rows.add_column(ROW_NUMBER, list(range(1, len(rows) + 1)))


def normalize(rows: Rows, reading: Reading, name: str = "the dataset") -> tuple[Dataset, str]:
    """Rows of any shape as a dataset to train on, with their numbers in the column `row_number_in_file`.

    Args:
        rows: The rows as they were published, with `number_rows` if they are not all of a file.
        reading: How to read them.
        name: What they are called in messages, such as their file.

    Returns:
        The rows, and the line that tells what was read and left out.

    Raises:
        ValueError: If nothing can be learnt from any row, with the reasons.
    """
    if not isinstance(rows, list):
        if is_ready(rows, reading):
            numbered = number_rows(rows)
            assert not isinstance(numbered, list)
            return numbered, f"{name}: {len(rows):,} rows, ready to train on"
        rows = _Nullless(rows, reading.text_field)
    elif reading.text_field != "text":
        rows = [{"text" if name == reading.text_field else name: value for name, value in row.items()} for row in rows]
    try:
        read = normalize_rows(rows, reading)
    except HostileRowError as error:
        raise ValueError(f"{name}: {error}") from None
    if not read.rows:
        raise ValueError(f"No row of {name} can be learnt from ({read}).")
    made = to_dataset([{**row, ROW_NUMBER: number} for row, number in zip(read.rows, read.numbers, strict=True)])
    return made, f"{name}: {read}"


def is_ready(dataset: Dataset, reading: Reading) -> bool:
    """Whether nothing has to be done to any row, looking at all of them; a dataset of tokens or images is."""
    names = set(dataset.column_names)
    if {"image", "images"} & names or ("input_ids" in names and not {"prompt", "text", *CONVERSATION_COLUMNS} & names):
        return True
    if reading.shape not in ("auto", "none") or (reading.every_reply and not {"prompt", "completion"} <= names):
        return False
    if reading.text_field != "text" and reading.text_field in names:
        return False
    return Shapes(_Nullless(dataset, "text"), reading).is_ready


class _Nullless:
    """The rows of a dataset without what Arrow adds; iterated in blocks, as often as asked."""

    def __init__(self, dataset: Dataset, text_field: str) -> None:
        if text_field != "text" and text_field in dataset.column_names:
            dataset = dataset.remove_columns([name for name in ("text",) if name in dataset.column_names])
            dataset = dataset.rename_column(text_field, "text")
        self._dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (without_nulls(row) for row in self._dataset)
