"""The frozen records that cross stages: `Problem`, `Trace`, `Verdict`.

A record flows one way: a `Problem` is read from a source, a `Trace` is what a model wrote for it, a `Verdict` says whether
that was right. Each turns into a flat dictionary for JSONL or a `datasets` row and back, and refuses a row that lacks a
column or holds the wrong type, with the name of both.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

RecordT = TypeVar("RecordT", bound="Record")

FinishReason = Literal["stop", "length"]
VerdictStatus = Literal["correct", "incorrect", "undecided"]


@dataclasses.dataclass(frozen=True)
class Record:
    """A frozen row with checked types; the base of all records that stages exchange."""

    _types: ClassVar[dict[str, tuple[type, ...]]] = {}

    @classmethod
    def _column_types(cls) -> dict[str, tuple[type, ...]]:
        if "_types" not in cls.__dict__:
            cls._types = {
                name: _runtime_types(hint)
                for name, hint in typing.get_type_hints(cls).items()
                if not name.startswith("_")
            }
        return cls._types

    @classmethod
    def from_row(cls: type[RecordT], row: Mapping[str, Any], where: str = "row") -> RecordT:
        """Build a record from a flat mapping, ignoring columns that are not its own.

        Args:
            row: Column name to value.
            where: Named in the error, such as `"traces.jsonl, line 12"`.

        Raises:
            ValueError: If a column is missing or holds a value of the wrong type.
        """
        values = {}
        for field in dataclasses.fields(cls):
            if field.name in row:
                value = row[field.name]
                allowed = cls._column_types()[field.name]
                if float in allowed and isinstance(value, int) and not isinstance(value, bool):
                    value = float(value)
                if not isinstance(value, allowed):
                    expected = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
                    raise ValueError(
                        f"{where}: {cls.__name__} wants {expected} in column {field.name!r}, found {type(value).__name__} ({value!r:.80})."
                    )
                values[field.name] = value
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{where}: {cls.__name__} needs the column {field.name!r}, found only {sorted(row)}.")
        return cls(**values)

    def to_row(self) -> dict[str, Any]:
        """The record as a flat dictionary, in the order of its fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _runtime_types(hint: Any) -> tuple[type, ...]:
    """The classes that `isinstance` should accept for a type hint of a record's field."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(t for arg in typing.get_args(hint) for t in _runtime_types(arg))
    if origin is Literal:
        return tuple({type(arg) for arg in typing.get_args(hint)})
    return (origin or hint,)


@dataclasses.dataclass(frozen=True)
class Problem(Record):
    """A question with a checkable answer.

    Attributes:
        id: Unique within its source, and stable: resumption and paired comparison rest on it.
        question: What the student is asked, without any prompt around it.
        answer: The final answer as text; `None` when the source has none.
        source: Name of the source it came from.
        solution: A reference solution (without the final answer's marker), where the source has one.
        kind: A label for balancing and for the report's break-down, such as a subject or a number of steps.
        response: What the source's own reply says after `solution`, where that is more than the answer.
    """

    id: str
    question: str
    answer: str | None
    source: str
    solution: str | None = None
    kind: str = ""
    response: str | None = None


@dataclasses.dataclass(frozen=True)
class Trace(Record):
    """What a model wrote for a problem.

    Attributes:
        problem_id: `Problem.id` of the problem it answers.
        sample: Number of the sample for this problem, from 0.
        question: The problem's question, so that a trace can be read by itself.
        answer: The problem's gold answer.
        completion: The model's text, special tokens removed.
        finish_reason: `"stop"` if the model ended by itself, `"length"` if it was cut; a cut trace is never taken for a whole one.
        num_tokens: Length of the completion in the model's tokens.
        model: Name or path of the model that wrote it.
        seed: The seed this sample was drawn with.
        kind: `Problem.kind`.
        source: `Problem.source`.
    """

    problem_id: str
    sample: int
    question: str
    answer: str | None
    completion: str
    finish_reason: FinishReason
    num_tokens: int
    model: str
    seed: int
    kind: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict(Record):
    """Whether an output is right, how that was decided, and why.

    Attributes:
        status: `"correct"`, `"incorrect"`, or `"undecided"` (not read whole, time-out, crash, no gold): never counted as wrong in silence.
        method: What decided: `"exact"`, `"numeric"`, `"symbolic"`, `"fuzzy"`, or `"none"`.
        reason: One line for a reader.
        extracted: The answer as the output has it; `None` if there is none.
        rule: What found it: a rule of `extract_answer`; empty where no output was looked at.
        timed_out: Whether the comparison reached its time-out.
    """

    status: VerdictStatus
    method: str
    reason: str
    extracted: str | None = None
    rule: str = ""
    timed_out: bool = False
