"""Two models' replies to one question, beside each other in a terminal, or one below the other where there is none.

What a model thought is dimmed, its answer is bold, and a line below says whether it is right. Whatever a model writes is shown as text:
control characters, which could move the cursor or rename the window, are replaced.
"""

from __future__ import annotations

import dataclasses
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.teacher.sampling import GenerationOutput
from trl_reasoning_distill.terminal import BOLD, DIM, GREEN, RED, YELLOW, paint, printable
from trl_reasoning_distill.verification.verify import verify_answer

MIN_COLUMN = 34  # narrower columns than this stand below each other
_GAP = " │ "
_STYLES = {"dim": DIM, "bold": BOLD, "head": f"{BOLD};4", "correct": GREEN, "incorrect": RED, "undecided": YELLOW}
_MARKS = {"correct": "✓", "incorrect": "✗", "undecided": "?"}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        name: The model's role.
        reasoning: What it thought, if it did.
        text: What it said after that.
        extracted_answer: The final answer found in it.
        verdict: Whether that is right; `None` without a gold answer.
        note: Tokens, seconds, and whether the text was cut.
    """

    name: str
    reasoning: str
    text: str
    extracted_answer: str | None
    verdict: Verdict | None
    note: str


def make_reply(name: str, output: GenerationOutput, response_format: ReasoningFormat, gold: str | None) -> Reply:
    """Part a completion into thought and answer, and verify the answer if there is one to compare with."""
    parsed = response_format.parse(output.text)
    reasoning, text = parsed.reasoning or "", parsed.answer or ""
    if not text:  # nothing that its format calls an answer: show what there is
        reasoning, text = ("", output.text) if not reasoning else (reasoning, "")
    verdict = verify_answer(output.text, gold)
    cut = ", cut at the token limit" if output.finish_reason == "length" else ""
    return Reply(
        name=name,
        reasoning=printable(reasoning),
        text=printable(text),
        extracted_answer=printable(verdict.extracted or "") or None,
        verdict=verdict if gold is not None else None,
        note=f"{output.num_tokens} tokens, {output.seconds:.1f} s{cut}",
    )


def render(replies: Sequence[Reply], *, width: int, color: bool) -> str:
    """The replies as text of at most `width` columns; with escape codes if `color`."""
    column = (width - len(_GAP) * (len(replies) - 1)) // len(replies)
    if column < MIN_COLUMN or len(replies) == 1:
        blocks = [
            "\n".join(paint(line, _STYLES.get(style, ""), color) for line, style in _lines(reply, width))
            for reply in replies
        ]
        return "\n\n".join(blocks)
    columns = [list(_lines(reply, column)) for reply in replies]
    height = max(map(len, columns))
    gap = paint(_GAP, DIM, color)
    rows = []
    for index in range(height):
        cells = [each[index] if index < len(each) else ("", "") for each in columns]
        painted = (
            paint(text, _STYLES.get(style, ""), color) + " " * (column - _columns(text)) for text, style in cells
        )
        rows.append(gap.join(painted).rstrip())
    return "\n".join(rows)


def _lines(reply: Reply, width: int) -> Iterator[tuple[str, str]]:
    """Lines of one reply, each with its style."""
    yield reply.name, "head"
    for line in _wrap(reply.reasoning, width - 2):
        yield f"┊ {line}", "dim"
    for line in _wrap(reply.text, width):
        yield line, "bold"
    if reply.verdict is None:
        told, style = (f"answer: {reply.extracted_answer}" if reply.extracted_answer else "no answer"), "dim"
    else:
        told, style = (
            f"{_MARKS[reply.verdict.status]} {reply.verdict.status}: {reply.verdict.reason}",
            reply.verdict.status,
        )
    for line in _wrap(printable(told), width):
        yield line, style
    for line in _wrap(reply.note, width):
        yield line, "dim"


def _wrap(text: str, width: int) -> Iterator[str]:
    for line in text.strip("\n").splitlines():
        if _columns(line) != len(line):  # wide or combining characters: textwrap would miscount them
            yield from _wrap_wide(line, width)
        else:
            yield from textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=True) or [""]


def _wrap_wide(line: str, width: int) -> Iterator[str]:
    piece = ""
    for character in line:
        if _columns(piece + character) > width:
            yield piece
            piece = ""
        piece += character
    yield piece


def _columns(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
