"""The frozen records that files hold: `Problem`, `Trace`, `VerifiedTrace`, `TrainingRow`, `Prediction`; and the `Verdict` in two of them.

A record flows one way: a `Problem` is read from a source, a `Trace` is what a teacher wrote for it, a `VerifiedTrace` adds the
`Verdict`, a `TrainingRow` is what a student learns from it, and a `Prediction` is what a model answered in an evaluation, with
its verdict. Each turns into a flat dictionary for JSONL or a `datasets` row and back, and refuses a row that lacks a column or
holds the wrong type, with the name of both.

One word for one thing: the *completion* is all that a model wrote, the *extracted answer* is the final answer found in it, the
*gold answer* is what that is compared with. Data sets of problems call the gold answer `answer`, and so do the two records
that are read from data sets, `Problem` and `TrainingRow`. Files of version 0.1.0 had other names, which are read too.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

RecordT = TypeVar("RecordT", bound="Record")

FinishReason = Literal["stop", "length", "error"]
VerdictStatus = Literal["correct", "incorrect", "undecided"]
Message = dict[str, Any]

_TIMED_OUT_0_1 = "no result within "
"""How version 0.1.0 began the reason of a verdict that timed out, which had no column of its own."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A frozen row with checked types; the base of all records that stages exchange."""

    _types: ClassVar[dict[str, tuple[type, ...]]] = {}
    _names_0_1: ClassVar[Mapping[str, str]] = {}
    """Fields to the names that their columns had in files of version 0.1.0."""

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
        if "timed_out" not in row and str(row.get("reason")).startswith(_TIMED_OUT_0_1):
            row = {**row, "timed_out": True}
        values = {}
        for field in dataclasses.fields(cls):
            column = field.name if field.name in row else cls._names_0_1.get(field.name, field.name)
            if column in row:
                value = row[column]
                allowed = cls._column_types()[field.name]
                if float in allowed and isinstance(value, int) and not isinstance(value, bool):
                    value = float(value)
                if not isinstance(value, allowed):
                    expected = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
                    raise ValueError(
                        f"{where}: {cls.__name__} wants {expected} in column {column!r}, found {type(value).__name__} ({value!r:.80})."
                    )
                values[field.name] = value
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
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
        response: The source's own reply after `solution`, where that is more than the answer.
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
    """What a model wrote for a problem: one row of `traces.jsonl`.

    Attributes:
        problem_id: `Problem.id` of the problem it answers.
        sample: Number of the sample for this problem, from 0.
        question: The problem's question, so that a trace can be read by itself.
        gold_answer: `Problem.answer`.
        completion: The model's text, special tokens removed.
        finish_reason: `"stop"` if the model ended by itself, `"length"` if it was cut; a cut trace is never taken for a whole one.
        num_tokens: Length of the completion in the model's tokens; 0 if a server did not report it.
        model: Name or path of the model that wrote it.
        seed: The seed this sample was drawn with.
        kind: `Problem.kind`.
        source: `Problem.source`.
        prompt_tokens: Length of the prompt in the model's tokens; 0 if a server did not report it.
    """

    _names_0_1: ClassVar[Mapping[str, str]] = {"gold_answer": "answer"}

    problem_id: str
    sample: int
    question: str
    gold_answer: str | None
    completion: str
    finish_reason: FinishReason
    num_tokens: int
    model: str
    seed: int
    kind: str = ""
    source: str = ""
    prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict(Record):
    """Whether a completion is right, how that was decided, and why.

    Attributes:
        status: `"correct"`, `"incorrect"`, or `"undecided"` (time-out, crash, unparseable gold): never counted as wrong in silence.
        method: What decided: `"exact"`, `"numeric"`, `"symbolic"`, `"fuzzy"`, or `"none"`.
        reason: One line for a reader.
        extracted: The answer that was found in the completion; `None` if there is none.
        rule: The rule of `extract_answer` that found it.
        timed_out: Whether the comparison was given up at its time limit.
    """

    status: VerdictStatus
    method: str
    reason: str
    extracted: str | None = None
    rule: str = "none"
    timed_out: bool = False

    def columns(self) -> dict[str, Any]:
        """The verdict as columns of a `VerifiedTrace` or a `Prediction`."""
        row = self.to_row()
        return {"extracted_answer": row.pop("extracted"), **row}


@dataclasses.dataclass(frozen=True)
class VerifiedTrace(Trace):
    """A trace with its verdict: one row of `verdicts.jsonl`.

    Attributes:
        status: `Verdict.status`.
        method: `Verdict.method`.
        reason: `Verdict.reason`.
        extracted_answer: `Verdict.extracted`; not in files of version 0.1.0.
        rule: `Verdict.rule`.
        timed_out: `Verdict.timed_out`.
        reasoning_ok: Whether the completion keeps to its format, with a reasoning that is not blank.
    """

    status: VerdictStatus = "undecided"
    method: str = "none"
    reason: str = ""
    extracted_answer: str | None = None
    rule: str = "none"
    timed_out: bool = False
    reasoning_ok: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingRow(Record):
    """What a student learns from: one row of `train.jsonl`. Messages, plain text, or tokens that were made elsewhere.

    Attributes:
        prompt: The conversation up to the turn that is learnt, `{"role": …, "content": …}` each; or text.
        completion: The turn or turns that are learnt; or text.
        answer: The gold answer, where there is one; nothing is trained on it.
        messages: A whole conversation of which every reply is learnt, instead of prompt and completion.
        text: Plain text of which everything is learnt, likewise.
        tools: JSON schemas of the tools that the chat template is to show.
        chat_template_kwargs: Variables for the chat template, of this row.
        loss_weight: A weight per token of `input_ids`.
        input_ids: The whole row as token ids, instead of messages.
        labels: The supervised ones of `input_ids`; −100 elsewhere.
        problem_id: `Problem.id`, where the row comes from a trace.
        kind: `Problem.kind`, likewise.
        source: `Problem.source`, likewise.
        pass_rate: Share of the problem's traces that are right, likewise; the lower, the harder.
    """

    prompt: list[Message] | str = dataclasses.field(default_factory=list)
    completion: list[Message] | str = dataclasses.field(default_factory=list)
    answer: str | None = None
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    loss_weight: list[float] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    problem_id: str | None = None
    kind: str | None = None
    source: str | None = None
    pass_rate: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The row as a flat dictionary: what it has, and where it is a prompt with its completion, the answer also if there is none."""
        row = {name: value for name, value in super().to_row().items() if value is not None}
        if self.messages is not None or self.text is not None or self.input_ids is not None:
            return {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        return row | {"answer": self.answer}


@dataclasses.dataclass(frozen=True)
class Prediction(Record):
    """What a model answered in an evaluation, with its verdict: one row of `predictions.jsonl`.

    Attributes:
        model: Name of the model in the report.
        problem_id: `Problem.id`.
        status: `Verdict.status`.
        sample: Number of the answer to this problem, from 0.
        method: `Verdict.method`.
        reason: `Verdict.reason`.
        extracted_answer: `Verdict.extracted`.
        rule: `Verdict.rule`.
        timed_out: `Verdict.timed_out`.
        question: `Problem.question`.
        gold_answer: `Problem.answer`.
        kind: `Problem.kind`.
        reference_steps: Steps of `Problem.solution`, where there is one.
        prompt: The conversation that asked.
        completion: The model's text, special tokens removed.
        finish_reason: As of a `Trace`; `"error"` where a server gave no answer. That is undecided, with the server's words as the reason.
        num_tokens: As of a `Trace`.
        prompt_tokens: As of a `Trace`.
        seconds: The request's latency on a server; its share of the batch's time in this process.
        mean_log_prob: Mean log-probability of the completion's tokens under the model, in nats; `None` from an engine that does
            not report it.
        model_path: What the name stands for: folder or hub name, with the options that can change an answer.
    """

    _names_0_1: ClassVar[Mapping[str, str]] = {
        "gold_answer": "gold",
        "extracted_answer": "answer",
        "completion": "output",
    }

    model: str
    problem_id: str
    status: VerdictStatus
    sample: int = 0
    method: str = "none"
    reason: str = ""
    extracted_answer: str | None = None
    rule: str = "none"
    timed_out: bool = False
    question: str = ""
    gold_answer: str | None = None
    kind: str = ""
    reference_steps: int | None = None
    prompt: list[Message] = dataclasses.field(default_factory=list)
    completion: str = ""
    finish_reason: FinishReason = "stop"
    num_tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    mean_log_prob: float | None = None
    model_path: str = ""
