"""Files and hub datasets without a source of their own: a column map, and a rule that finds the answer in its column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from trl_reasoning_distill.data.formatting import answer_boxed, split_marked_answer
from trl_reasoning_distill.data.normalization import normalize_row
from trl_reasoning_distill.data.published import Reading, detect_shape
from trl_reasoning_distill.data.shapes import THINK, WORKED, Demonstration, demonstrations, split_reasoning
from trl_reasoning_distill.data.sources.base import Fields, number_text


def _boxed(text: str) -> str:
    answer = answer_boxed(text, strict=True)
    if answer is None:
        raise ValueError("the solution boxes no answer")
    return answer


ANSWER_RULES: Mapping[str, Callable[[str], str | None]] = {
    "as_is": str.strip,
    "optional": str.strip,
    "gsm8k": lambda text: split_marked_answer(text)[1],
    "boxed": _boxed,
    "number": number_text,
}
"""How the answer's column becomes the answer: as it stands (`optional`: if it is there), after GSM8K's `####`, from the last `\\boxed{}`, or
as a number."""

DEFAULT_COLUMNS: Mapping[str, str] = {
    name: name for name in ("question", "answer", "solution", "response", "kind", "id", "source")
}


def column_reader(
    columns: Mapping[str, str] | None = None, answer_rule: str = "as_is"
) -> Callable[[Fields], dict[str, Any]]:
    """A `SourceSpec.read_row` from a column map.

    Args:
        columns: Our field to the column that holds it.
        answer_rule: One of `ANSWER_RULES`.

    Raises:
        ValueError: For a field that a problem does not have, or an unknown rule.
    """
    if unknown := sorted(set(columns or {}) - set(DEFAULT_COLUMNS)):
        raise ValueError(
            f"columns names {unknown}; a problem has {sorted(DEFAULT_COLUMNS)}, each mapped to a column of the file."
        )
    if answer_rule not in ANSWER_RULES:
        raise ValueError(f"Unknown answer_rule {answer_rule!r}; there are {sorted(ANSWER_RULES)}.")
    return partial(_read, columns={**DEFAULT_COLUMNS, **(columns or {})}, answer_rule=answer_rule)


def published_reader(row: Fields) -> dict[str, Any]:
    """A `SourceSpec.read_row` for a file of any published shape; a row may have a question alone.

    Raises:
        ValueError: If it asks nothing, or a conversation of several turns.
    """
    shape = detect_shape(row)
    if "question" in row and shape not in ("gsm8k", "s1k", "messages"):
        return _read(row, DEFAULT_COLUMNS, "optional")
    if shape is not None and shape in WORKED:
        try:
            return worked_fields(demonstrations(row, shape)[0])
        except ValueError:
            if shape != "question_answer" or "problem" not in row:
                raise
    if shape is not None and shape in ("messages", "alpaca", "prompt_completion"):
        return _asked(normalize_row(row, shape, Reading(THINK, needs_reply=False))[0])
    return _read(row, {**DEFAULT_COLUMNS, "question": "problem"} if "problem" in row else DEFAULT_COLUMNS, "optional")


def worked_fields(demonstration: Demonstration) -> dict[str, Any]:
    """A problem's fields from a question with a worked reply."""
    return {
        "question": demonstration.question,
        "answer": demonstration.final_answer,
        "solution": demonstration.reasoning,
        "response": demonstration.response,
    }


def _asked(row: Fields) -> dict[str, Any]:
    """A problem's fields from a training row that asks one question."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    if len(asked) != 1:
        raise ValueError(f"it asks {len(asked)} questions in turn; a problem is one")
    fields = {"question": asked[0], "answer": row.get("answer")}
    reply = completion[-1]["content"]
    if not reply.strip():
        return fields
    reasoning, response = split_reasoning(reply)
    return fields | {"solution": reasoning, "response": response if reasoning else None}


def _read(row: Fields, columns: Mapping[str, str], answer_rule: str) -> dict[str, Any]:
    needed = {"question"} if answer_rule == "optional" else {"question", "answer"}
    fields = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row or ours in needed}
    answer = fields.get("answer")
    fields["answer"] = None if answer is None else ANSWER_RULES[answer_rule](_text(answer))
    return fields


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    raise ValueError(f"the answer is a {type(value).__name__} ({value!r:.40}), not text or a number")
