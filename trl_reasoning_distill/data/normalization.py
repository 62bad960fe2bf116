"""The one way in for rows: from any shape that people publish to what a student is trained on (`TrainingRow`), or refused by number.

All rows are looked at before one is read: a shape is a matter of the file, and a column may begin anywhere. Conversations, instructions,
pairs of prompt and completion, and plain text keep the reply as it was published; worked problems (`data.shapes`) are written anew in the
configured format.

| shape | columns | trained |
|---|---|---|
| `prompt_completion` | `prompt` and `completion`, both messages or text | the completion |
| `messages` | `messages` or `conversations`: OpenAI's messages, or ShareGPT's turns with their role words; a reply may stand beside them (`reasoning`, `answer`) | the last reply |
| `alpaca` | `instruction` or `query`, with `input`, `system`, `history`; `output` or `response` | the output |
| `text`, `tokens` | `text`; `input_ids` | all of it; its labels |
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from trl_reasoning_distill.data.row_files import FILE_SUFFIXES, read_rows, without_nulls
from trl_reasoning_distill.data.schema import TrainingRow
from trl_reasoning_distill.data.shapes import (
    GOLD_COLUMNS,
    OPEN_THOUGHTS,
    REPLY_COLUMNS,
    THINK,
    WORKED,
    demonstrations,
    first_text,
    split_reasoning,
    thought_of,
    training_row,
    worked_shape,
    written,
)

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
Rows: TypeAlias = "list[dict[str, Any]] | Dataset"
"""Rows as they are published: of a file, or of a dataset."""

PUBLISHED = ("prompt_completion", "messages", "alpaca", "text", "tokens")
SHAPES = (*PUBLISHED, *WORKED)
_ALSO = {"sharegpt": "messages"}
_INSTRUCTIONS, _OUTPUTS = ("instruction", "query"), ("output", "response")
_CHARACTERS = re.compile("[\x00\ud800-\udfff]")
_OWN_TEMPLATE_OPTIONS = ("tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "return_tensors", "messages", "conversation")  # fmt: skip
_LISTED = 3

ROW_NUMBER = "row_number_in_file"
"""Column with the number that a row has in its file, from 1."""


class HostileRowError(ValueError):
    """A row that would decide how the others are rendered: the whole set is refused."""


def check_shape(shape: str) -> None:
    """Refuse a name that is no shape.

    Raises:
        ValueError: With those that there are.
    """
    if shape not in ("auto", "none", *SHAPES, *_ALSO):
        raise ValueError(f"Unknown data_shape {shape!r}; there are auto, none, {', '.join((*SHAPES, *_ALSO))}.")


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


@dataclasses.dataclass(frozen=True)
class NormalizedRows:
    """What `normalize_rows` made.

    Attributes:
        rows: Rows to train on, with the columns that the data has beside them.
        numbers: Of each of them the number of the row it came from, from 1.
        rejected: Number and reason of each row that gave none.
        shapes: Shape to the number of its rows.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    rejected: list[tuple[int, str]]
    shapes: dict[str, int]

    def __str__(self) -> str:
        return describe_reading(len(self.rows), self.shapes, self.rejected)


def describe_reading(rows: int, shapes: Mapping[str, int], rejected: Sequence[tuple[int, str]]) -> str:
    """One line: how many rows, of which shapes, and what was left out, each reason with the numbers of its first rows."""
    found = sum(shapes.values())
    names = ", ".join(shapes if len(shapes) == 1 else (f"{name} ({count:,})" for name, count in shapes.items()))
    by_reason: dict[str, list[int]] = {}
    for number, reason in rejected:
        by_reason.setdefault(reason, []).append(number)
    reasons = sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_LISTED]
    why = "; ".join(f"{len(numbers):,} × {reason} ({name_rows(numbers)})" for reason, numbers in reasons)
    return (
        f"{rows:,} rows from {found:,} of shape{'s' * (len(shapes) > 1)} {names}, {len(rejected):,} left out"
        f"{f': {why}' if why else ''}"
    )


def name_rows(numbers: Sequence[int]) -> str:
    """`row 3`, or `rows 3, 8, 9, …`."""
    shown = ", ".join(f"{number:,}" for number in numbers[:_LISTED])
    return f"row{'s' * (len(numbers) > 1)} {shown}{', …' * (len(numbers) > _LISTED)}"


class Shapes:
    """The shape of every row of a set: its own, or that of its file where most rows have a mark that it lacks.

    Args:
        rows: All rows.
        reading: How they are to be read.

    Raises:
        HostileRowError: If a row brings a chat template, or sets how templates are called.
    """

    def __init__(self, rows: Iterable[Row], reading: Reading) -> None:
        self._reading = reading
        counts: Counter[str | None] = Counter()
        self.is_ready = True
        for index, row in enumerate(rows):
            _refuse_template(row, row.get(ROW_NUMBER, index + 1))
            self.is_ready = self.is_ready and is_training_row(row)
            counts[self._own(row)] += 1
        # In a file of GSM8K or OpenThoughts a row without the mark is a damaged one, not one of another shape
        self._instead = {
            plain: marked
            for plain, marked in (("question_answer", "gsm8k"), ("messages", "openthoughts"))
            if counts[marked] > counts[plain]
        }
        self.counts: dict[str, int] = {}
        for name, count in counts.items():
            known = self._instead.get(str(name), str(name or "unknown"))
            self.counts[known] = self.counts.get(known, 0) + count

    def of(self, row: Row) -> str:
        """The shape of a row.

        Raises:
            ValueError: If its columns are none.
        """
        name = self._own(row)
        if name is None:
            raise ValueError(
                f"the columns {sorted(row)} are none of the shapes {', '.join(SHAPES)}; rename the columns, or name data_shape"
            )
        return self._instead.get(name, name)

    def _own(self, row: Row) -> str | None:
        wanted = self._reading.shape
        if wanted not in ("auto", "none"):
            return _ALSO.get(wanted, wanted)
        if not self._reading.needs_reply and isinstance(row.get("prompt"), str):
            return "prompt_completion"
        return detect_shape(row) if wanted == "auto" else published_shape(row)


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


def is_training_row(row: Row) -> bool:
    """Whether a row needs nothing done: `prompt` and `completion` in our own words, tokens, or text."""
    if row.get("input_ids") is not None:
        return True
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None and completion is None:
        text = row.get("text")
        return (
            isinstance(text, str)
            and bool(text.strip())
            and not _CHARACTERS.search(text)
            and detect_shape(row) == "text"
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        return bool(completion.strip()) and not _CHARACTERS.search(prompt) and not _CHARACTERS.search(completion)
    if not (isinstance(prompt, list) and isinstance(completion, list) and prompt and completion):
        return False
    return (
        all(map(_is_plain, (*prompt, *completion)))
        and completion[-1]["role"] == "assistant"
        and bool(completion[-1]["content"].strip())
        and isinstance(row.get("answer"), str | None)
        and isinstance(row.get("tools"), list | None)
        and isinstance(row.get("chat_template_kwargs"), dict | None)
    )


def normalize_rows(rows: Iterable[Row], reading: Reading) -> NormalizedRows:
    """Rows to train on, from rows of any shape.

    Args:
        rows: The rows as they were published, with `number_rows` if they are not all of a file; iterated twice.
        reading: How to read them.

    Raises:
        HostileRowError: As `Shapes`.
    """
    shapes = Shapes(rows, reading)
    made, origins, rejected = [], [], []
    for index, row in enumerate(rows):
        number = row.get(ROW_NUMBER, index + 1)
        try:
            found = normalize_row(row, shapes.of(row), reading)
        except ValueError as error:
            rejected.append((number, str(error)))
            continue
        made.extend(found)
        origins.extend([number] * len(found))
    return NormalizedRows(made, origins, rejected, shapes.counts)


def normalize_row(row: Row, shape: str, reading: Reading) -> list[dict[str, Any]]:
    """The training rows of one row.

    Raises:
        ValueError: With the reason why nothing can be learnt from it.
    """
    if is_training_row(row) and shape in PUBLISHED and not (reading.every_reply and shape == "messages"):
        return [dict(row)]
    if shape in WORKED:
        lowered = {name.lower(): value for name, value in row.items() if value is not None}
        found = demonstrations(lowered, shape)[: reading.generations]
        made = [TrainingRow(**training_row(one, reading.form)).to_row() for one in found]
        used: frozenset[str] = frozenset(row)  # a published set's other columns are its own book-keeping
    else:
        made = [_READERS[shape](row, reading).to_row()]
        used = _USED
    for each in made:
        _refuse_characters(each)
        if "answer" not in row and each.get("answer") is None:
            each.pop("answer", None)
    rest = {name: value for name, value in row.items() if name not in used and value is not None}
    return [{**rest, **each} for each in made]


# --- One function per published shape ---


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


_READERS = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
}
_USED = frozenset(
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
    last = whole[-1]
    if reading.needs_reply and not last["content"].strip() and not last.get("tool_calls"):
        raise ValueError("its last reply is empty: there is no reply to learn")
    last["content"] = in_format(last["content"], reading.form)
    refuse_conversation_without_question(whole[:start])
    beside = _beside(row)
    if beside.get("answer") is None and (answer := _gold(row, last["content"])):
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
        tools = _from_json(tools, "tools")
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"its tools are a {type(tools).__name__}, not a list of JSON schemas")
        if tools:
            found["tools"] = tools
    if row.get("chat_template_kwargs"):
        found["chat_template_kwargs"] = _from_json(row["chat_template_kwargs"], "chat_template_kwargs")
    return found


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"its {column} is not JSON ({error})") from None


def _refuse_template(row: Row, number: int) -> None:
    variables = row.get("chat_template_kwargs")
    if not variables:
        return
    try:
        variables = _from_json(variables, "chat_template_kwargs")
    except ValueError:  # the row will be left out for it
        return
    if isinstance(variables, Mapping):
        for name in ("chat_template", *_OWN_TEMPLATE_OPTIONS):
            if variables.get(name) is not None:
                raise HostileRowError(
                    f"Row {number} sets {name} in its chat_template_kwargs, which would render it unlike the others and unlike the store's "
                    "fingerprint. Take it out of the row; a template for all rows is given with chat_template_path."
                )


def _is_plain(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ("user", "assistant", "system", "tool")
        and isinstance(message["content"], str)
        and not _CHARACTERS.search(message["content"])
    )


def _refuse_characters(row: Row) -> None:
    """Refuse characters that no tokenizer can read and no file can hold."""
    for column in ("prompt", "completion", "messages", "text"):
        for text in _texts(row.get(column)):
            if match := _CHARACTERS.search(text):
                what = (
                    "a NUL character" if match.group() == "\0" else f"half of a character (\\u{ord(match.group()):04x})"
                )
                raise ValueError(f"its {column} holds {what}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


# --- Datasets ---


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
        rows = _Nullless(rows, reading.text_field)  # type: ignore[assignment]
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
