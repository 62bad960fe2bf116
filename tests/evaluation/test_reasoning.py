"""Reasoning metrics: form, read by hand from small texts."""

from __future__ import annotations

import pytest

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.evaluation.reasoning import ReasoningForm, reasoning_form, reasoning_metrics

WHOLE = "<think>\nFirst 2+2=4.\nThen 4*3=12.\nSo it is twelve, that is a dozen of them, or three times the four we had.\n</think>\n\n12"


def test_a_whole_thought_scores_full() -> None:
    assert reasoning_form(WHOLE) == ReasoningForm(True, True, True, steps=3, words=21, quality=1.0)


@pytest.mark.parametrize(
    ("text", "tags", "reasoning", "well_formed", "steps", "words"),
    [
        ("<think>\n2+2=4\n</think>\n\n4", True, True, True, 1, 1),
        ("<think>\n\n</think>\n\n4", True, False, True, 0, 0),
        ("<think>\n2+2=4", False, True, False, 1, 1),
        ("4", False, False, True, 0, 0),
        ("", False, False, False, 0, 0),
        ("<think>\nWe add. That makes 4.5 in all; good.\n\n---\n</think>\n\n4.5", True, True, True, 3, 9),
    ],
)
def test_form_is_what_stands_there(
    text: str, tags: bool, reasoning: bool, well_formed: bool, steps: int, words: int
) -> None:
    response_format = ReasoningFormat.preset("think") if "<think>" in text else None
    form = reasoning_form(text, response_format)
    assert (form.has_think_tags, form.has_reasoning, form.is_well_formed) == (tags, reasoning, well_formed)
    assert (form.steps, form.words) == (steps, words)
    assert 0 <= form.quality <= 1


def test_a_format_without_tags_is_held_against_its_own_markers() -> None:
    form = reasoning_form("2+2=4\n4*3=12\n#### 12", ReasoningFormat.preset("gsm8k"))
    assert (form.has_think_tags, form.is_well_formed, form.steps) == (False, True, 2)
    assert not reasoning_form("it is 12", ReasoningFormat.preset("gsm8k")).is_well_formed


def test_form_is_not_truth() -> None:
    assert reasoning_form(WHOLE.replace("12", "13")).quality == reasoning_form(WHOLE).quality


def test_metrics_are_means_and_empty_is_zero() -> None:
    metrics = reasoning_metrics([WHOLE, "4"])
    assert metrics["think_tag_rate"] == 0.5
    assert metrics["mean_steps"] == 1.5
    assert set(reasoning_metrics([]).values()) == {0.0}
