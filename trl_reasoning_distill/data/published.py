"""Conversations, instructions, pairs of prompt and completion, and plain text: their shapes, and what reads each into a `TrainingRow`.

| shape | columns | trained |
|---|---|---|
| `prompt_completion` | `prompt` and `completion`, both messages or text | the completion |
| `messages` | `messages` or `conversations`: OpenAI's messages, or ShareGPT's turns with their role words; a reply may stand beside them (`reasoning`, `answer`) | the last reply |
| `alpaca` | `instruction` or `query`, with `input`, `system`, `history`; `output` or `response` | the output |
| `text`, `tokens` | `text`; `input_ids` | all of it; its labels |

The reply stays as it was published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.conversations import (
    CONVERSATION_COLUMNS,
    Message,
    read_messages,
    read_text,
    refuse_conversation_without_question,
    turns_of,
    write_thought,
)
from trl_reasoning_distill.data.formatting import ReasoningFormat, answer_boxed
from trl_reasoning_distill.data.schema import TrainingRow
from trl_reasoning_distill.data.shapes import (
    GOLD_COLUMNS,
    OPEN_THOUGHTS,
    REPLY_COLUMNS,
    THINK,
    WORKED,
    first_text,
    split_reasoning,
    thought_of,
    worked_shape,
    written,
)

Row = Mapping[str, Any]

PUBLISHED = ("prompt_completion", "messages", "alpaca", "text", "tokens")
SHAPES = (*PUBLISHED, *WORKED)
ALSO = {"sharegpt": "messages"}
_INSTRUCTIONS, _OUTPUTS = ("instruction", "query"), ("output", "response")


def check_shape(shape: str) -> None:
    """Refuse a name that is no shape.

    Raises:
        ValueError: With those that there are.
    """
    if shape not in ("auto", "none", *SHAPES, *ALSO):
        raise ValueError(f"Unknown data_shape {shape!r}; there are auto, none, {', '.join((*SHAPES, *ALSO))}.")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        form: How a thought and an answer are written where they are written anew.
        shape: One of `SHAPES`; `"auto"` finds it; `"none"` takes prompts and completions, messages, text and tokens alone.
        generations: At most this many correct generations of a row that holds several.
        every_reply: Keep a conversation whole (`messages`), for a loss on each of its replies.
        needs_reply: Refuse a row without a reply; otherwise its completion is empty.
        text_field: The column that holds plain text.
    """

    form: ReasoningFormat
    shape: str = "auto"
    generations: int = 1
    every_reply: bool = False
    needs_reply: bool = True
    text_field: str = "text"

    def __post_init__(self) -> None:
        check_shape(self.shape)


def published_shape(row: Row) -> str | None:
    """Which of `PUBLISHED` a row is, or `None`."""
    held = {name for name, value in row.items() if value is not None}
    if "input_ids" in held:
        return "tokens"
    if {"prompt", "completion"} <= held:
        return "prompt_completion"
    if any(turns_of(row[name]) for name in CONVERSATION_COLUMNS if name in held):
        return "messages"
    if any(isinstance(row[name], list) and row[name] for name in ("prompt", "input") if name in held):
        return "messages"
    if any(name in held for name in _INSTRUCTIONS) and any(name in held for name in _OUTPUTS):
        return "alpaca"
    return "text" if "text" in held and isinstance(row["text"], str) else None


def detect_shape(row: Row) -> str | None:
    """The shape of a row by itself, from the columns that hold something and, where two shapes share them, its text."""
    held = {name.lower(): value for name, value in row.items() if value is not None}
    published, worked = published_shape(held), worked_shape(held)
    if published in ("tokens", "prompt_completion") or (
        published == "messages" and worked not in ("openthoughts", "openr1_math")
    ):
        return published
    if published == "alpaca" and worked == "question_answer":
        return published
    return worked or published or ("prompt_completion" if isinstance(held.get("prompt"), str) else None)


def _text(row: Row, reading: Reading) -> TrainingRow:
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError("its text is empty")
    return TrainingRow(text=row["text"])


def _prompt_completion(row: Row, reading: Reading) -> TrainingRow:
    prompt, completion = row["prompt"], row.get("completion")
    completion = "" if completion is None and isinstance(prompt, str) else completion
    if isinstance(prompt, str) and isinstance(completion, str) and not (turns_of(prompt) and turns_of(completion)):
        if not completion.strip() and reading.needs_reply:
            raise ValueError("its completion is empty: there is no reply to learn")
        return TrainingRow(prompt=prompt, completion=completion, **_beside(row))
    messages = _as_messages(prompt, "user", reading.form)
    replies = _as_messages(completion, "assistant", reading.form)
    return _conversation(messages, replies, row, reading)


def _as_messages(value: Any, role: str, form: ReasoningFormat) -> list[Message]:
    if isinstance(value, str) and not turns_of(value):
        return [{"role": role, "content": value}]
    return read_messages(value, form)


def _messages(row: Row, reading: Reading) -> TrainingRow:
    column = next(name for name in (*CONVERSATION_COLUMNS, "prompt", "input") if turns_of(row.get(name)))
    messages = read_messages(row[column], reading.form)
    system = first_text(row, ("system", "system_prompt"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system[1]})
    replies: list[Message] = []
    if messages[-1]["role"] != "assistant" and (reply := _reply_beside(row, reading.form)):
        replies = [{"role": "assistant", "content": reply}]
    return _conversation(messages, replies, row, reading)


def _alpaca(row: Row, reading: Reading) -> TrainingRow:
    instruction, extra = first_text(row, _INSTRUCTIONS), row.get("input")
    if instruction is None:
        raise ValueError("its instruction is empty")
    question = read_text(row[instruction[0]], "its instruction")
    if extra is not None and read_text(extra, "its input").strip():
        question = f"{question}\n{extra}"
    messages: list[Message] = []
    if system := first_text(row, ("system", "system_prompt")):
        messages.append({"role": "system", "content": system[1]})
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError("its history is no list of pairs of a question and a reply")
        asked, replied = (read_text(each, "its history") for each in pair)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    messages.append({"role": "user", "content": question})
    reply = _reply_beside(row, reading.form)
    return _conversation(messages, [{"role": "assistant", "content": reply}] if reply else [], row, reading)


READERS = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
}
USED_COLUMNS = frozenset(
    {
        *(
            "prompt",
            "completion",
            "answer",
            "text",
            "tools",
            "functions",
            "chat_template_kwargs",
            "system",
            "system_prompt",
        ),
        *("history", "input", "output", "reasoning", *CONVERSATION_COLUMNS, *_INSTRUCTIONS, *_OUTPUTS),
    }
)


def _reply_beside(row: Row, form: ReasoningFormat) -> str | None:
    """A reply in columns of its own beside the conversation, with its thought; `None` without one."""
    thought = thought_of(row)
    reply = first_text(row, (*REPLY_COLUMNS, "answer", "solution") if thought else REPLY_COLUMNS)
    if reply is None:
        return None
    return write_thought(thought[1], reply[1], form) if thought else reply[1]


def _conversation(messages: list[Message], replies: list[Message], row: Row, reading: Reading) -> TrainingRow:
    """The training row of a conversation: its last reply is the completion, all before it the prompt."""
    whole = [*messages, *replies]
    start = len(messages) if replies else _last_reply(whole)
    whole, start = _without_weightless(whole, start)
    if not whole or whole[-1]["role"] != "assistant":
        if reading.needs_reply or (whole and start < len(whole)):
            last = f"ends with a turn of {whole[-1]['role']}" if whole else "is empty"
            raise ValueError(f"the conversation {last}: there is no reply to learn")
        refuse_conversation_without_question(whole)
        return TrainingRow(prompt=whole, completion=[{"role": "assistant", "content": ""}], **_beside(row))
    reply = whole[-1]
    if reading.needs_reply and not reply["content"].strip() and not reply.get("tool_calls"):
        raise ValueError("its last reply is empty: there is no reply to learn")
    reply["content"] = in_format(reply["content"], reading.form)
    refuse_conversation_without_question(whole[:start])
    beside = _beside(row)
    if beside.get("answer") is None and (answer := _gold(row, reply["content"])):
        beside["answer"] = answer
    if reading.every_reply and not replies:
        return TrainingRow(messages=whole, **beside)
    return TrainingRow(prompt=whole[:start], completion=whole[start:], **beside)


def _last_reply(messages: Sequence[Message]) -> int:
    """Where the last reply begins; the end where the conversation does not end with one."""
    return len(messages) - 1 if messages and messages[-1]["role"] == "assistant" else len(messages)


def _without_weightless(messages: list[Message], start: int) -> tuple[list[Message], int]:
    """The conversation up to its last reply that is to be learnt, by OpenAI's `weight` of 0 or 1, without these weights.

    Raises:
        ValueError: If a weight is neither, or every reply has the weight 0.
    """
    weights = [message.pop("weight", None) for message in messages]
    if any(weight is not None and weight not in (0, 1) for weight in weights):
        raise ValueError(
            f"a turn has the weight {next(w for w in weights if w not in (None, 0, 1))!r}; known are 0 and 1"
        )
    if not messages or weights[-1] != 0:
        return messages, start
    learnt = [index for index, message in enumerate(messages) if message["role"] == "assistant" and weights[index] != 0]
    if not learnt:
        raise ValueError("every reply has the weight 0: there is nothing to learn")
    return messages[: learnt[-1] + 1], learnt[-1]


def in_format(reply: str, form: ReasoningFormat) -> str:
    """A reply whose thought is tagged in another way than the format's, written in the format; any other as it is.

    Raises:
        ValueError: If its thought is not well formed, or the format cannot hold it.
    """
    for foreign in (OPEN_THOUGHTS, THINK):
        if foreign.open_tag == form.open_tag or not reply.lstrip().startswith(foreign.open_tag):
            continue
        reasoning, response = split_reasoning(reply)
        if not form.answer_prefix:
            return form.render(reasoning or "", response)
        answer = answer_boxed(response) or (response if len(response.split()) == 1 else None)
        if answer is None:
            raise ValueError(f"it has no final answer to put after {form.answer_prefix.strip()!r}")
        return form.render(reasoning or response, answer)
    return reply


def _gold(row: Row, reply: str) -> str | None:
    """The short answer that can be checked: the row's own, or the one that the reply boxes."""
    turns = next((turns for name in CONVERSATION_COLUMNS if (turns := turns_of(row.get(name)))), [])
    info = turns[-1].get("info") if turns and isinstance(turns[-1], Mapping) else None
    gold = first_text({**(info if isinstance(info, Mapping) else {}), **row}, GOLD_COLUMNS)
    return gold[1] if gold else answer_boxed(reply)


def _beside(row: Row) -> dict[str, Any]:
    """What a row has beside its conversation: the gold answer, tools, and variables for its chat template."""
    found: dict[str, Any] = {}
    if "answer" in row:
        found["answer"] = written(row["answer"])
    tools = next((row[name] for name in ("tools", "functions") if row.get(name)), None)
    if tools is not None:
        tools = from_json(tools, "tools")
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"its tools are a {type(tools).__name__}, not a list of JSON schemas")
        if tools:
            found["tools"] = tools
    if row.get("chat_template_kwargs"):
        found["chat_template_kwargs"] = from_json(row["chat_template_kwargs"], "chat_template_kwargs")
    return found


def from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"its {column} is not JSON ({error})") from None
