r"""The shapes that reasoning data comes in, each read into one record: question, reasoning, response, final answer.

| shape | columns | reasoning | response |
|---|---|---|---|
| `openthoughts` | `conversations` with `<\|begin_of_thought\|>`, or `problem`, `deepseek_reasoning`, `deepseek_solution` | the thought | the solution |
| `openr1_math` | `problem`, `generations`, `correctness_math_verify`, … | in `<think>` | after `</think>` |
| `numinamath_qwq` | `prompt`, `response`, `ground_truth`, `correct` | all before the last `**Final Answer**` | what follows it |
| `gsm8k` | `question`, `answer` with `####` | the steps, without `<<48/2=24>>` | the number |
| `question_answer` | a question and an answer under one of their usual names | its own column, or tags in the answer | the answer |
| `sharegpt` | `conversations` of `from` and `value` (or `role` and `content`), or `messages` | tags in the last reply | what follows them |

A row that cannot be learnt from is refused with its reason: no correct generation, a thought that never ends, no answer.
Prompts that ask for the tags of the data's own format (OpenThoughts' system prompt) are dropped with those tags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.formatting import ReasoningFormat, last_boxed, split_marked_answer

Row = Mapping[str, Any]

_OPEN_THOUGHTS = ReasoningFormat("openthoughts", "<|begin_of_thought|>", "<|end_of_thought|>")
_TAGGED = (ReasoningFormat.preset("think"), _OPEN_THOUGHTS)
_SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
_QWQ_HEADING = "**Final Answer**"

_QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "query")
_REASONING_COLUMNS = ("reasoning", "reasoning_content", "thinking", "rationale", "chain_of_thought", "cot")
_REPLY_COLUMNS = ("response", "output", "completion")
_RESPONSE_COLUMNS = (*_REPLY_COLUMNS, "answer", "solution", "target")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"} | {
    "system": "system",
    "tool": "tool",
}


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A question with a worked reply.

    Attributes:
        question: The last turn of the user.
        reasoning: The chain of thought, without tags; `None` if the reply has none.
        response: What the reply says after its reasoning: a whole solution, or just a number.
        final_answer: The short answer that can be checked: the row's gold answer where it has one, else what the response boxes;
            `None` without either.
        history: Messages before the question, a system message among them.
    """

    question: str
    reasoning: str | None
    response: str
    final_answer: str | None
    history: tuple[dict[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class ConvertedRows:
    """What `convert_rows` made.

    Attributes:
        rows: Training rows: `prompt`, `completion`, `answer`.
        rejected: Index and reason of each row that gave none.
    """

    rows: list[dict[str, Any]]
    rejected: list[tuple[int, str]]


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Part a reply into its tagged reasoning (`<think>` or OpenThoughts' tags; `None` without tags) and what follows.

    Raises:
        ValueError: If the reasoning never ends, or nothing follows it.
    """
    for form in _TAGGED:
        if form.open_tag in text or form.close_tag in text:
            parsed = form.parse(text)
            response = _without_solution_tags(parsed.answer or "")
            if parsed.answer is None and form.close_tag not in text:
                raise ValueError(f"the reasoning never ends: there is no {form.close_tag}")
            if not response:
                raise ValueError(f"nothing follows {form.close_tag}")
            return (parsed.reasoning or "").strip() or None, response
    return None, _without_solution_tags(text)


# --- One function per shape ---


def _openthoughts(row: Row) -> list[Demonstration]:
    if "deepseek_reasoning" in row:
        solution = _text(row, "deepseek_solution")
        answer = _boxed(row.get("ground_truth_solution") or "") or _boxed(solution)
        return [Demonstration(_text(row, "problem"), _text(row, "deepseek_reasoning"), solution, answer)]
    (demonstration,) = _sharegpt(row)
    if demonstration.reasoning is None:
        raise ValueError(f"the reply has no {_OPEN_THOUGHTS.open_tag}…{_OPEN_THOUGHTS.close_tag}")
    # The system prompt, a column of its own, asks for the tags that are taken away here
    history = tuple(message for message in demonstration.history if message["role"] != "system")
    return [dataclasses.replace(demonstration, history=history)]


def _openr1_math(row: Row) -> list[Demonstration]:
    """The generations that were found correct, those that Math-Verify confirmed before those that only a model did."""
    generations = row["generations"] or []
    whole = row.get("is_reasoning_complete") or [True] * len(generations)
    by_rule = row.get("correctness_math_verify") or [None] * len(generations)
    by_model = row.get("correctness_llama") or [None] * len(generations)
    found, reason = [], "no generation is both correct and complete"
    for rank, verdicts in enumerate((by_rule, by_model)):
        for index, text in enumerate(generations):
            if not (whole[index] and verdicts[index]) or (rank and by_rule[index]):
                continue
            try:
                reasoning, response = split_reasoning(text)
            except ValueError as error:
                reason = f"generation {index}: {error}"
                continue
            answer = _short(row.get("answer")) or _boxed(response)
            found.append(Demonstration(_text(row, "problem"), reasoning, response, answer))
    if not found:
        raise ValueError(reason)
    return found


def _numinamath_qwq(row: Row) -> list[Demonstration]:
    if not row.get("correct", True):
        raise ValueError("its answer was found wrong")
    text = _text(row, "response")
    answer = _short(row.get("ground_truth")) or _boxed(text)
    reasoning, heading, response = text.rpartition(_QWQ_HEADING)
    if not (heading and reasoning.strip() and response.strip()):
        if answer is None:
            raise ValueError("the response has no final answer")
        reasoning, response = text, f"\\boxed{{{answer}}}"
    return [Demonstration(_text(row, "prompt"), reasoning.strip(), response.strip(), answer)]


def _gsm8k(row: Row) -> list[Demonstration]:
    solution, answer = split_marked_answer(_text(row, "answer"))
    return [Demonstration(_text(row, "question"), solution or None, answer, answer)]


def _question_answer(row: Row) -> list[Demonstration]:
    question = _first(row, _QUESTION_COLUMNS)
    thought = _first(row, _REASONING_COLUMNS)
    gold = _short(row.get("answer"))
    if question is None:
        raise ValueError(f"there is no question: none of the columns {', '.join(_QUESTION_COLUMNS)} holds text")
    if thought is None and gold is not None and _first(row, _REPLY_COLUMNS) is None:
        thought = _first(row, ["solution"])  # a worked solution beside its answer
    reply = _first(row, [name for name in _RESPONSE_COLUMNS if thought is None or name != thought[0]])
    if reply is None:
        raise ValueError(f"there is no answer: none of the columns {', '.join(_RESPONSE_COLUMNS)} holds text")
    reasoning, response = (thought[1], reply[1]) if thought else split_reasoning(reply[1])
    if reasoning is None and "####" in response:
        return _gsm8k({"question": question[1], "answer": response})
    short = response if reply[0] in ("answer", "target") else None
    answer = gold if gold is not None and reply[0] != "answer" else _boxed(response) or short
    return [Demonstration(question[1], reasoning, response, answer)]


def _sharegpt(row: Row) -> list[Demonstration]:
    turns = [_message(turn) for turn in row.get("conversations") or row.get("messages") or []]
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or turns[-2]["role"] != "user":
        raise ValueError(
            f"the conversation ends with {[turn['role'] for turn in turns[-2:]]}, not a question and a reply"
        )
    if isinstance(row.get("system"), str) and row["system"] and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": row["system"]})
    reasoning, response = split_reasoning(turns[-1]["content"])
    return [
        Demonstration(turns[-2]["content"], reasoning, response, _boxed(response), tuple(turns[:-2])),
    ]


SHAPES: Mapping[str, Callable[[Row], list[Demonstration]]] = {
    "openthoughts": _openthoughts,
    "openr1_math": _openr1_math,
    "numinamath_qwq": _numinamath_qwq,
    "gsm8k": _gsm8k,
    "question_answer": _question_answer,
    "sharegpt": _sharegpt,
}


def detect_shape(row: Row) -> str:
    """The shape of a row, from its columns and, where two shapes share them, its text.

    Raises:
        ValueError: If it has none of `SHAPES`, with the columns it has.
    """
    if "generations" in row and "problem" in row:
        return "openr1_math"
    if "deepseek_reasoning" in row:
        return "openthoughts"
    if row.get("conversations") or row.get("messages"):
        turns = row.get("conversations") or row.get("messages") or []
        return "openthoughts" if _OPEN_THOUGHTS.open_tag in str(turns[-1]) else "sharegpt"
    if {"prompt", "response", "ground_truth"} <= row.keys():
        return "numinamath_qwq"
    if "question" in row and "####" in str(row.get("answer")):
        return "gsm8k"
    if set(_QUESTION_COLUMNS) & row.keys() and set(_RESPONSE_COLUMNS) & row.keys():
        return "question_answer"
    raise ValueError(
        f"The columns {sorted(row)} are none of the shapes {', '.join(SHAPES)}. Rename the columns, or name the shape."
    )


def convert_row(row: Row, shape: str = "auto") -> list[Demonstration]:
    """Read a row; more than one demonstration only where it holds several correct generations, the surest first.

    Args:
        row: A row of the dataset.
        shape: One of `SHAPES`, or `"auto"`.

    Raises:
        ValueError: For an unknown shape, or with the reason why nothing can be learnt from this row.
    """
    name = detect_shape(row) if shape == "auto" else shape
    if name not in SHAPES:
        raise ValueError(f"Unknown shape {shape!r}; there are auto, {', '.join(SHAPES)}.")
    try:
        return SHAPES[name](row)
    except KeyError as error:
        raise ValueError(f"a row of shape {name} needs the column {error}; found {sorted(row)}") from None


def training_row(demonstration: Demonstration, form: ReasoningFormat) -> dict[str, Any]:
    """A row that every trainer takes: `prompt` and `completion` as messages, and the gold `answer`.

    A format that marks its answer (`gsm8k`, `boxed`, `final_answer`) is given the final answer, the others the whole response.

    Raises:
        ValueError: If the format wants what the demonstration has not, or its text holds the format's own markers.
    """
    reasoning, answer = demonstration.reasoning, demonstration.response
    if form.answer_prefix:
        if demonstration.final_answer is None:
            raise ValueError(f"it has no final answer to put after {form.answer_prefix.strip()!r}")
        answer = demonstration.final_answer
        reasoning = reasoning if reasoning is not None or answer == demonstration.response else demonstration.response
    if form.open_tag and reasoning is None:
        raise ValueError(f"it has no reasoning to put in {form.open_tag}")
    history = list(demonstration.history)
    if form.system_prompt and not any(message["role"] == "system" for message in history):
        history.insert(0, {"role": "system", "content": form.system_prompt})
    return {
        "prompt": [*history, {"role": "user", "content": demonstration.question}],
        "completion": [{"role": "assistant", "content": form.render(reasoning or "", answer)}],
        "answer": demonstration.final_answer,
    }


def convert_rows(rows: Iterable[Row], shape: str, form: ReasoningFormat, *, per_row: int = 1) -> ConvertedRows:
    """Training rows from rows of one shape, and the rows that gave none, with their reasons.

    Args:
        rows: Rows of the dataset.
        shape: One of `SHAPES`, or `"auto"`.
        form: How the completions are to be written.
        per_row: At most this many of a row's correct generations.
    """
    converted: list[dict[str, Any]] = []
    rejected = []
    for index, row in enumerate(rows):
        try:
            converted.extend(training_row(found, form) for found in convert_row(row, shape)[:per_row])
        except ValueError as error:
            rejected.append((index, str(error)))
    return ConvertedRows(converted, rejected)


# --- Reading values ---


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"its {column} is empty" if not value else f"its {column} is a {type(value).__name__}, not text"
        )
    return value.strip()


def _short(value: Any) -> str | None:
    """A value that may be a number as text; `None` for nothing."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _first(row: Row, columns: Sequence[str]) -> tuple[str, str] | None:
    """The first of these columns that holds something, and what."""
    return next(((name, text) for name in columns if (text := _short(row.get(name))) is not None), None)


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"a turn of {role!r} with {type(content).__name__} content")
    return {"role": _ROLES[role], "content": content}


def _without_solution_tags(text: str) -> str:
    begin, end = _SOLUTION_TAGS
    return text.strip().removeprefix(begin).removesuffix(end).strip()


def _boxed(text: str) -> str | None:
    box = last_boxed(text)
    return text[box[1] : box[2]].strip() or None if box else None
