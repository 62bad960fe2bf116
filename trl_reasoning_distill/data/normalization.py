"""The one way in for rows: from any shape that people publish to what a student is trained on (`TrainingRow`), or refused by number.

All rows are looked at before one is read: a shape is a matter of the file, and a column may begin anywhere. Conversations, instructions,
pairs of prompt and completion, and plain text (`data.published`) keep the reply as it was published; worked problems (`data.shapes`) are
written anew in the configured format.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.published import (
    ALSO,
    PUBLISHED,
    READERS,
    SHAPES,
    USED_COLUMNS,
    Reading,
    detect_shape,
    from_json,
    published_shape,
)
from trl_reasoning_distill.data.schema import TrainingRow
from trl_reasoning_distill.data.shapes import WORKED, demonstrations, training_row

Row = Mapping[str, Any]

ROW_NUMBER = "row_number_in_file"
"""Column with the number that a row has in its file, from 1."""

_CHARACTERS = re.compile("[\x00\ud800-\udfff]")
_OWN_TEMPLATE_OPTIONS = ("tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "return_tensors", "messages", "conversation")  # fmt: skip
_LISTED = 3


class HostileRowError(ValueError):
    """A row that would decide how the others are rendered: the whole set is refused."""


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
            return ALSO.get(wanted, wanted)
        if not self._reading.needs_reply and isinstance(row.get("prompt"), str):
            return "prompt_completion"
        return detect_shape(row) if wanted == "auto" else published_shape(row)


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
        made = [READERS[shape](row, reading).to_row()]
        used = USED_COLUMNS
    for each in made:
        _refuse_characters(each)
        if "answer" not in row and each.get("answer") is None:
            each.pop("answer", None)
    rest = {name: value for name, value in row.items() if name not in used and value is not None}
    return [{**rest, **each} for each in made]


def _refuse_template(row: Row, number: int) -> None:
    variables = row.get("chat_template_kwargs")
    if not variables:
        return
    try:
        variables = from_json(variables, "chat_template_kwargs")
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
