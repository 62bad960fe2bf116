"""Training examples as a person sees them: the text, what of it is supervised, and what reads back from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import IGNORE_INDEX

SUPERVISED = ("⟦", "⟧")
_SHOWN = 600


def describe_examples(rows: Iterable[Mapping[str, Any]], tokenizer: Any, form: ReasoningFormat) -> str:
    """Every row as text, with supervised tokens in `⟦…⟧`, and the reasoning and the answer that the format reads in them.

    Args:
        rows: With `input_ids` and `labels`.
        tokenizer: Decodes them.
        form: Reads the supervised text.
    """
    return "\n".join(_describe(number, row, tokenizer, form) for number, row in enumerate(rows, start=1))


def _describe(number: int, row: Mapping[str, Any], tokenizer: Any, form: ReasoningFormat) -> str:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    shown, supervised = [], 0
    for is_supervised, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        ids = [token for token, _ in group]
        text = _shorten(tokenizer.decode(ids))
        shown.append(text.join(SUPERVISED) if is_supervised else text)
        supervised += len(ids) * is_supervised
    labels = row["labels"]
    start = next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    opened = form.is_opened_by(tokenizer.decode(row["input_ids"][:start]))
    parsed = form.parse(tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True), opened=opened)
    reasoning = "no reasoning" if not parsed.reasoning else f"a reasoning of {len(parsed.reasoning.split()):,} words"
    answer = "no answer" if parsed.answer is None else f"the answer {_shorten(parsed.answer.strip(), 80)!r}"
    verdict = "well formed" if parsed.well_formed else "not well formed"
    return (
        f"--- example {number}: {len(labels):,} tokens, {supervised:,} supervised {'…'.join(SUPERVISED)}\n{''.join(shown)}\n"
        f"--- reads back as {reasoning} and {answer}; {verdict} ({form.name})"
    )


def _shorten(text: str, limit: int = _SHOWN) -> str:
    """The two ends of a text that is too long to show."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} […{len(text) - limit:,} characters…] {text[-limit // 2 :]}"
