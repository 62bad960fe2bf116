"""Two models' replies to one question, beside each other in a terminal, or one below the other where there is none.

What a model thought is dimmed, its answer is bold, and a line below says whether it is right. Whatever a model writes is shown as text:
control characters, which could move the cursor or rename the window, are replaced.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.teacher.sampling.loop import Sample
from trl_reasoning_distill.terminal import DIM, paint, printable, wrapped

MIN_COLUMN = 34  # narrower columns than this stand below each other
_GAP = " │ "
_STYLES = {"correct": "green", "incorrect": "red", "undecided": "yellow"}
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


def make_reply(name: str, sample: Sample, response_format: ReasoningFormat) -> Reply:
    """A completion as thought and answer, with its verdict if there is a gold answer."""
    output, verdict = sample.output, sample.verdict
    parsed = response_format.parse(output.text)
    reasoning, text = parsed.reasoning or "", parsed.answer or ""
    if not text:  # nothing that its format calls an answer: show what there is
        reasoning, text = ("", output.text) if not reasoning else (reasoning, "")
    cut = ", cut at the token limit" if output.finish_reason == "length" else ""
    return Reply(
        name=name,
        reasoning=printable(reasoning),
        text=printable(text),
        extracted_answer=printable(verdict.extracted or "") or None,
        verdict=verdict if sample.problem.answer is not None else None,
        note=f"{output.num_tokens} tokens, {output.seconds:.1f} s{cut}",
    )


def render(replies: Sequence[Reply], *, width: int, color: bool) -> str:
    """The replies as text of at most `width` columns; with escape codes if `color`."""
    column = (width - len(_GAP) * (len(replies) - 1)) // len(replies)
    if column < MIN_COLUMN or len(replies) == 1:
        return "\n\n".join("\n".join(map(str.rstrip, _lines(reply, width, color))) for reply in replies)
    columns = [_lines(reply, column, color) for reply in replies]
    gap, empty = paint(_GAP, DIM, color), " " * column
    return "\n".join(gap.join(cells).rstrip() for cells in itertools.zip_longest(*columns, fillvalue=empty))


def _lines(reply: Reply, width: int, color: bool) -> list[str]:
    """A reply as lines that fill `width` columns."""
    result, style = f"answer: {reply.extracted_answer}" if reply.extracted_answer else "no answer", "dim"
    if reply.verdict is not None:
        style = _STYLES[reply.verdict.status]
        result = f"{_MARKS[reply.verdict.status]} {reply.verdict.status}: {reply.verdict.reason}"
    return [
        *wrapped(reply.name, width, "bold underline", colour=color),
        *wrapped(reply.reasoning, width, "dim", colour=color, prefix="┊ "),
        *wrapped(reply.text, width, "bold", colour=color),
        *wrapped(result, width, style, colour=color),
        *wrapped(reply.note, width, "dim", colour=color),
    ]
