"""Replies beside each other: nothing wider than the terminal, nothing that the terminal would obey."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.evaluation.side_by_side import Reply, make_reply, render
from trl_reasoning_distill.teacher.sampling import GenerationOutput, GenerationRequest
from trl_reasoning_distill.teacher.sampling.loop import Sample
from trl_reasoning_distill.verification.verify import verify_answer

THINK = ReasoningFormat.preset("think")


def reply(text: str, gold: str | None = None, name: str = "student", reason: str = "stop") -> Reply:
    output = GenerationOutput(text, reason, 7, 3, 0.25)  # type: ignore[arg-type]
    problem = Problem(id="p", question="?", answer=gold, source="s")
    sample = Sample(problem, 0, GenerationRequest("p#0", []), output, verify_answer(text, gold))
    return make_reply(name, sample, THINK)


def test_thought_answer_and_verdict_are_told_apart() -> None:
    right = reply("<think>\n12+7=19.\n</think>\n\n19", gold="19")
    assert (right.reasoning, right.text, right.extracted_answer) == ("12+7=19.", "19", "19")
    assert right.verdict is not None
    assert right.verdict.status == "correct"
    shown = render([right], width=60, color=True)
    assert "\x1b[2m┊ 12+7=19.\x1b[0m" in shown
    assert "\x1b[1m19\x1b[0m" in shown
    assert "\x1b[32m✓ correct" in shown
    assert "7 tokens, 0.2 s" in shown
    assert "✗ incorrect" in render([reply("<think>\nx\n</think>\n\n18", gold="19")], width=60, color=False)
    assert "answer: 19" in render([reply("<think>\n12+7=19.\n</think>\n\n19")], width=60, color=False)


def test_a_thought_that_never_ended_is_shown_and_said_to_be_cut() -> None:
    shown = render([reply("<think>\nlet me see", gold="1", reason="length")], width=60, color=False)
    assert "let me see" in shown
    assert "✗ incorrect: the reasoning never ended" in shown
    assert "cut at the token limit" in shown


def test_two_stand_beside_each_other_where_there_is_room() -> None:
    replies = [reply("<think>\na\n</think>\n\n1"), reply("<think>\nb\nc\n</think>\n\n2", name="teacher")]
    beside = render(replies, width=80, color=False).splitlines()
    assert beside[0].split() == ["student", "│", "teacher"]
    assert len({line.index("│") for line in beside if "│" in line}) == 1
    below = render(replies, width=60, color=False).splitlines()
    assert "teacher" in below
    assert not any("│" in line for line in below)


@given(st.text(max_size=200), st.sampled_from([40, 80, 111]))
@settings(max_examples=60, deadline=None)
def test_whatever_a_model_writes_fits_and_is_only_shown(text: str, width: int) -> None:
    both = [reply(text, gold="1"), reply(f"<think>\n{text}\n</think>\n\n{text}", name="teacher")]
    shown = render(both, width=width, color=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


@pytest.mark.parametrize("text", ["word " * 60, "日本語の文章です。" * 12, "x" * 300])
def test_no_line_is_wider_than_asked(text: str) -> None:
    both = [reply(f"<think>\n{text}\n</think>\n\n{text}"), reply(text, name="teacher")]
    for line in render(both, width=80, color=False).splitlines():
        assert sum(2 if ord(character) > 0x2FFF else 1 for character in line) <= 80
