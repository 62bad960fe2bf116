"""What a source is, and what reading one gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from trl_reasoning_distill.data.schema import Problem

Fields = Mapping[str, Any]
Cause = Literal["bad_row", "duplicate", "near_duplicate", "contaminated", "not_rendered"]


class SourceUnavailableError(ValueError):
    """The rows of a source cannot be had here: no such file, or the hub is out of reach."""


@dataclass(frozen=True)
class Split:
    """Where one part of a source lies.

    Attributes:
        hub_split: The hub's name of it.
        file: Its file under `data_dir`.
        hub_id: Dataset on the hub, if it is not the source's own.
    """

    hub_split: str
    file: str
    hub_id: str | None = None


@dataclass(frozen=True)
class SourceSpec:
    """A source of problems.

    Attributes:
        name: What it is called in recipes.
        read_row: Makes a problem's fields (`question`, `answer`, and if it has them `solution`, `response`, `kind`, `id`) from a row; raises
            `ValueError` or `KeyError` with the reason if the row is bad.
        hub_id: Dataset on the hub.
        splits: Our name of a split to where it lies; the first is the default.
        response_format: The preset whose prompt asks for answers as this source writes them; `response_format: source` takes it.
        config: The hub dataset's configuration.
        revision: The hub dataset's revision.
        streaming: Whether the hub's rows are streamed, because the dataset is too large to download for a sample.
        benchmarks: Splits that models are compared on, which training data must not hold.
    """

    name: str
    read_row: Callable[[Fields], dict[str, Any]]
    hub_id: str
    splits: Mapping[str, Split]
    response_format: str
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    benchmarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a problem that is well formed is not wanted."""

    cause: Cause
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class RejectedRow:
    """A row that was left out.

    Attributes:
        where: The source and the row's number.
        reason: In one line.
        cause: `"bad_row"`, or why a good problem was not wanted: `"duplicate"`, `"near_duplicate"`, `"contaminated"`; or why a problem has no
            training row: `"not_rendered"`.
        row: The row as it was read.
        detail: What the cause counts by: for `"contaminated"`, the evaluation set.
    """

    where: str
    reason: str
    cause: Cause = "bad_row"
    row: Fields = field(default_factory=dict)
    detail: str = ""

    def to_row(self) -> dict[str, Any]:
        """A flat dictionary for JSONL; what JSON has no word for becomes its text."""
        row = json.loads(json.dumps(dict(self.row), default=str), parse_constant=str)
        return {"where": self.where, "cause": self.cause, "reason": self.reason, "row": row}


@dataclass(frozen=True)
class SourceRead:
    """What was read from a source, and what was left out."""

    problems: list[Problem]
    rejected: list[RejectedRow] = field(default_factory=list)


def number_text(value: Any) -> str:
    """A number as its shortest exact decimal: `-9867630.0` becomes `-9867630`.

    Raises:
        ValueError: If it is none, or not finite.
    """
    try:
        number = Decimal(str(value).replace(",", "").strip())
    except InvalidOperation:
        raise ValueError(f"the answer {value!r:.40} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"the answer {value!r} is not a finite number")
    return format(number.to_integral_value() if number == number.to_integral_value() else number.normalize(), "f")
