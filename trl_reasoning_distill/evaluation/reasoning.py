"""What does the reasoning look like? Form, not truth.

These figures describe how a text is built: whether it thinks in tags, in how many steps, at what length. They are useful to
see that a distilled student has taken over its teacher's way of writing, or has stopped to think at all. They say nothing
about whether a step is right: a model that writes tidy nonsense scores 1. Read them beside accuracy, never instead of it.

The quality score is the mean of three parts, each 0 to 1:

- *structure*: the response keeps to its format (⅓ for a reasoning, ⅓ for an answer after it, ⅓ if well formed throughout);
- *steps*: steps in the reasoning, full at `FULL_STEPS`;
- *length*: words in the reasoning, full at `FULL_WORDS`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from trl_reasoning_distill.data.formatting import ReasoningFormat

FULL_STEPS = 3
FULL_WORDS = 20


@dataclasses.dataclass(frozen=True)
class ReasoningForm:
    """The form of one response.

    Attributes:
        has_think_tags: Whether it opens and closes a thought in tags.
        has_reasoning: Whether there is any text of reasoning before the answer.
        is_well_formed: Whether it keeps to its format from start to end.
        steps: Lines of the reasoning that hold at least one word or number; sentences, if it is all one line.
        words: Words of the reasoning.
        quality: The score described above, 0 to 1.
    """

    has_think_tags: bool
    has_reasoning: bool
    is_well_formed: bool
    steps: int
    words: int
    quality: float


def reasoning_form(text: str, response_format: ReasoningFormat | None = None) -> ReasoningForm:
    """Describe a response.

    Args:
        text: What the model wrote.
        response_format: How it was to write; default: think tags if the text has any, else plain text.
    """
    think = ReasoningFormat.preset("think")
    has_tags = 0 <= text.find(think.open_tag) < text.find(think.close_tag)
    if response_format is None:
        response_format = think if has_tags else ReasoningFormat.preset("plain")
    parsed = response_format.parse(text)
    reasoning = (parsed.reasoning or "").strip()
    steps, words = count_steps(reasoning), len(reasoning.split())
    structure = (bool(reasoning) + bool(reasoning and parsed.answer) + parsed.well_formed) / 3
    quality = (structure + min(1.0, steps / FULL_STEPS) + min(1.0, words / FULL_WORDS)) / 3
    return ReasoningForm(has_tags, bool(reasoning), parsed.well_formed, steps, words, quality)


def reasoning_metrics(texts: Iterable[str], response_format: ReasoningFormat | None = None) -> dict[str, float]:
    """Means over responses: shares with tags, with reasoning and well formed, steps, words, quality.

    Returns:
        `think_tag_rate`, `reasoning_rate`, `well_formed_rate`, `mean_steps`, `mean_words` and `quality`; all 0 without texts.
    """
    forms = [reasoning_form(text, response_format) for text in texts]

    def mean(name: str) -> float:
        return sum(float(getattr(form, name)) for form in forms) / max(len(forms), 1)

    return {
        "think_tag_rate": mean("has_think_tags"),
        "reasoning_rate": mean("has_reasoning"),
        "well_formed_rate": mean("is_well_formed"),
        "mean_steps": mean("steps"),
        "mean_words": mean("words"),
        "quality": mean("quality"),
    }


def count_steps(reasoning: str) -> int:
    """Lines that hold at least one word or number; sentences, if it is all one line."""
    lines = [line for line in reasoning.splitlines() if any(map(str.isalnum, line))]
    if len(lines) != 1:
        return len(lines)
    return sum(any(map(str.isalnum, sentence)) for sentence in re.split(r"[.!?;](?=\s|$)", lines[0]))
