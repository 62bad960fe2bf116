r"""The shapes that reasoning data is published in, each read into question, reasoning, response and final answer.

| shape | columns | reasoning | response |
|---|---|---|---|
| `openthoughts` | `conversations` with `<\|begin_of_thought\|>` (OpenThoughts, Bespoke-Stratos, Sky-T1), or `problem`, `deepseek_reasoning`, `deepseek_solution` | the thought | the solution |
| `openr1_math` | `problem`, `generations`, `correctness_math_verify`, … | in `<think>` | after `</think>` |
| `numinamath_qwq` | `prompt`, `response`, `ground_truth`, `correct` | all before the last `**Final Answer**` | what follows it |
| `s1k` | `question`, a thinking trajectory and an attempt, by Gemini or DeepSeek | the trajectory | the attempt |
| `gsm8k` | `question`, `answer` that ends with a line `#### 24` | the steps, without `<<48/2=24>>` | the number |
| `question_answer` | a question and an answer under one of their usual names (LIMO, NuminaMath, OpenMathReasoning, …) | its own column, or tags in the answer | the answer |

These are worked problems: what the student reads is written anew, in the configured format. Conversations and instructions
(`data.normalization`) keep the reply as it was published.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.conversations import (
    CONVERSATION_COLUMNS,
    REASONING_FIELDS,
    Message,
    read_messages,
    turns_of,
)
from trl_reasoning_distill.data.formatting import (
    ANSWER_MARK,
    ReasoningFormat,
    answer_boxed,
    split_marked_answer,
)
from trl_reasoning_distill.data.row_files import WrittenFloat

Row = Mapping[str, Any]

THINK = ReasoningFormat.preset("think")
OPEN_THOUGHTS = ReasoningFormat("openthoughts", "<|begin_of_thought|>", "<|end_of_thought|>")
_SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
_QWQ_HEADING = "**Final Answer**"
_MARKED_LINE = re.compile(rf"(?:^|\n){ANSWER_MARK} ?\S[^\n]*\s*\Z")
_SWITCHES = ("on", "off")

QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction", "query", "input")
REASONING_COLUMNS = (*REASONING_FIELDS, "rationale", "chain_of_thought", "cot", "complex_cot")
REPLY_COLUMNS = ("response", "output", "completion", "generated_solution")
RESPONSE_COLUMNS = (*REPLY_COLUMNS, "answer", "solution", "target", "expected_answer")
GOLD_COLUMNS = ("answer", "expected_answer", "ground_truth", "reference_answer", "final_answer")
_TRAJECTORIES = (
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("gemini_thinking_trajectory", "gemini_attempt"),
    ("thinking_trajectories", "attempt"),
)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A question with a worked reply.

    Attributes:
        question: The last turn of the user.
        reasoning: The chain of thought, without tags; `None` if the reply has none.
        response: What the reply gives after its reasoning: a whole solution, or just a number.
        final_answer: The short answer that can be checked: the row's gold answer where it has one, else what the response boxes;
            `None` without either.
        history: Messages before the question, a system message among them.
    """

    question: str
    reasoning: str | None
    response: str
    final_answer: str | None
    history: tuple[Message, ...] = ()


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Part a reply into its tagged reasoning (`<think>` or OpenThoughts' tags; `None` without tags) and what follows.

    Raises:
        ValueError: If the reasoning never ends, or nothing follows it.
    """
    for form in (THINK, OPEN_THOUGHTS):
        if form.open_tag in text or form.close_tag in text:
            parsed = form.parse(text)
            response = _without_solution_tags(parsed.answer or "")
            if parsed.answer is None and form.close_tag not in text:
                raise ValueError(f"the reasoning never ends: there is no {form.close_tag}")
            if not response:
                raise ValueError(f"nothing follows {form.close_tag}")
            return (parsed.reasoning or "").strip() or None, response
    return None, _without_solution_tags(text)


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


# --- One function per shape ---


def _openthoughts(row: Row) -> list[Demonstration]:
    if "deepseek_reasoning" in row:
        solution = _text(row, "deepseek_solution")
        answer = answer_boxed(row.get("ground_truth_solution") or "") or answer_boxed(solution)
        return [Demonstration(_text(row, "problem"), _text(row, "deepseek_reasoning"), solution, answer)]
    messages = read_messages(next(row[name] for name in CONVERSATION_COLUMNS if row.get(name)), THINK)
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        roles = [message["role"] for message in messages[-2:]]
        raise ValueError(f"the conversation ends with {roles}, not a question and a reply")
    reasoning, response = split_reasoning(messages[-1]["content"])
    if reasoning is None:
        raise ValueError(f"the reply has no {OPEN_THOUGHTS.open_tag}…{OPEN_THOUGHTS.close_tag}")
    # The system prompt, a column of its own, asks for the tags that are taken away here
    history = tuple(message for message in messages[:-2] if message["role"] != "system")
    return [Demonstration(messages[-2]["content"], reasoning, response, answer_boxed(response), history)]


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
            answer = written(row.get("answer")) or answer_boxed(response)
            found.append(Demonstration(_text(row, "problem"), reasoning, response, answer))
    if not found:
        raise ValueError(reason)
    return found


def _numinamath_qwq(row: Row) -> list[Demonstration]:
    if not row.get("correct", True):
        raise ValueError("its answer was found wrong")
    text = _text(row, "response")
    answer = written(row.get("ground_truth")) or answer_boxed(text)
    reasoning, heading, response = text.rpartition(_QWQ_HEADING)
    if not (heading and reasoning.strip() and response.strip()):
        if answer is None:
            raise ValueError("the response has no final answer")
        reasoning, response = text, f"\\boxed{{{answer}}}"
    return [Demonstration(_text(row, "prompt"), reasoning.strip(), response.strip(), answer)]


def _s1k(row: Row) -> list[Demonstration]:
    """DeepSeek's trace where it was found right or nothing was judged, else Gemini's."""
    found = [pair for pair in _TRAJECTORIES if row.get(pair[0]) and row.get(pair[1])]
    right = [pair for pair in found if str(row.get(pair[1].replace("attempt", "grade"))).strip().lower() != "no"]
    if not right:
        raise ValueError("none of its attempts was found right" if found else "it has no thinking trajectory")
    thought, attempt = right[0]
    trajectory = row[thought] if isinstance(row[thought], str) else "\n".join(map(str, row[thought]))
    response = _text(row, attempt)
    return [Demonstration(_text(row, "question"), trajectory.strip(), response, answer_boxed(response))]


def _gsm8k(row: Row) -> list[Demonstration]:
    solution, answer = split_marked_answer(_text(row, "answer"))
    return [Demonstration(_text(row, "question"), solution or None, answer, answer)]


def _question_answer(row: Row) -> list[Demonstration]:
    question = first_text(row, QUESTION_COLUMNS)
    thought = thought_of(row)
    gold = first_text(row, GOLD_COLUMNS)
    if question is None:
        raise ValueError(f"there is no question: none of the columns {', '.join(QUESTION_COLUMNS)} holds text")
    if thought is None and gold is not None and first_text(row, REPLY_COLUMNS) is None:
        thought = first_text(row, ["solution"])  # a worked solution beside its answer
    reply = first_text(row, [name for name in RESPONSE_COLUMNS if thought is None or name != thought[0]])
    if reply is None:
        raise ValueError(f"there is no answer: none of the columns {', '.join(RESPONSE_COLUMNS)} holds text")
    reasoning, response = (thought[1], reply[1]) if thought else split_reasoning(reply[1])
    if reasoning is None and is_marked(response):
        solution, answer = split_marked_answer(response)
        return [Demonstration(question[1], solution or None, answer, answer)]
    short = response if reply[0] in (*GOLD_COLUMNS, "target") else None
    final = gold[1] if gold is not None and reply[0] != gold[0] else answer_boxed(response) or short
    return [Demonstration(question[1], reasoning, response, final)]


WORKED: Mapping[str, Callable[[Row], list[Demonstration]]] = {
    "openthoughts": _openthoughts,
    "openr1_math": _openr1_math,
    "numinamath_qwq": _numinamath_qwq,
    "s1k": _s1k,
    "gsm8k": _gsm8k,
    "question_answer": _question_answer,
}
"""Shape to what reads a row of it; more than one demonstration only where a row holds several correct generations, the surest first."""


def demonstrations(row: Row, shape: str) -> list[Demonstration]:
    """What can be learnt from a row of one of the shapes `WORKED`.

    Raises:
        ValueError: With the reason why nothing can be.
    """
    try:
        return WORKED[shape](row)
    except KeyError as error:
        raise ValueError(f"a row of shape {shape} needs the column {error}; found {sorted(row)}") from None


def worked_shape(row: Row) -> str | None:
    """Which of `WORKED` the columns are, or `None`."""
    if "generations" in row and "problem" in row:
        return "openr1_math"
    if "deepseek_reasoning" in row:
        return "openthoughts"
    if "question" in row and any(pair[0] in row for pair in _TRAJECTORIES):
        return "s1k"
    if is_open_thoughts(row):
        return "openthoughts"
    if any(row.get(name) for name in CONVERSATION_COLUMNS):
        return None
    if {"prompt", "response", "ground_truth"} <= row.keys():
        return "numinamath_qwq"
    if "question" in row and is_marked(row.get("answer")):
        return "gsm8k"
    asks = any(name in row for name in QUESTION_COLUMNS)
    return "question_answer" if asks and any(name in row for name in RESPONSE_COLUMNS) else None


def is_marked(answer: Any) -> bool:
    """Whether a text ends with GSM8K's line `#### 24`; a heading of Markdown further up is none."""
    return isinstance(answer, str) and _MARKED_LINE.search(answer) is not None


def is_open_thoughts(row: Row) -> bool:
    """Whether the last turn of a conversation holds OpenThoughts' tags."""
    turns = turns_of(next((row[name] for name in CONVERSATION_COLUMNS if row.get(name)), None))
    return bool(turns) and OPEN_THOUGHTS.open_tag in str(turns[-1])


# --- Reading values ---


def written(value: Any) -> str | None:
    """A text, or a number as it was written; `None` for nothing and for what is neither.

    Raises:
        ValueError: For a number that is none (NaN) or infinite.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"it has {value} where text or a number is wanted")
        return value.written if isinstance(value, WrittenFloat) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def first_text(row: Row, columns: Sequence[str]) -> tuple[str, str] | None:
    """The first of these columns that holds something, and what."""
    return next(((name, text) for name in columns if (text := written(row.get(name))) is not None), None)


def thought_of(row: Row) -> tuple[str, str] | None:
    """The column with the chain of thought, and the thought; a switch (`reasoning: "on"`) is none."""
    found = first_text(row, REASONING_COLUMNS)
    return None if found is None or found[1].lower() in _SWITCHES else found


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"its {column} is empty" if not value else f"its {column} is a {type(value).__name__}, not text"
        )
    return value.strip()


def _without_solution_tags(text: str) -> str:
    begin, end = _SOLUTION_TAGS
    return text.strip().removeprefix(begin).removesuffix(end).strip()
