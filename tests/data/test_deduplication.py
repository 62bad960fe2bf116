"""Duplicates are found, and problems that only look alike are kept."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import pytest

from trl_reasoning_distill.data.deduplication import Deduplicator
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.extras import MissingExtraError

QUESTION = (
    "Amanda received $50 as a gift. She plans to buy two cassette tapes that cost $9 each and a headphone set "
    "that costs $25. How much money will she have left?"
)
FIRST = Problem("first", QUESTION, "7", "s")


def problem(question: str, answer: str | None = "7") -> Problem:
    return Problem("second", question, answer, "s")


def test_the_same_words_are_the_same_question() -> None:
    find = Deduplicator(None)
    assert find(FIRST) is None
    refusal = find(problem(QUESTION.upper().replace(".", " …")))
    assert refusal is not None
    assert (refusal.cause, refusal.reason) == ("duplicate", "the same question as first")
    other = find(problem(QUESTION, "8"))
    assert other is not None
    assert "which gives the answer '7', not '8'" in other.reason
    assert find(problem(QUESTION.replace("gift", "present"))) is None, "near duplicates were not asked for"
    assert find(problem("√?")) is None
    assert find(problem("∑?")) is None


@pytest.mark.parametrize(
    ("question", "answer", "near"),
    [
        (QUESTION.replace("Amanda", "Bella"), "7", True),
        (QUESTION.replace("gift", "present"), None, True),
        (QUESTION.replace("$9", "$8"), "7", False),  # other numbers
        (QUESTION.replace("two", "three"), "7", False),  # also in words
        (QUESTION.replace("left", "spent"), "43", False),  # another answer
        ("A train travels 270 miles in 3 hours.", "7", False),
    ],
)
def test_near_duplicates_have_the_same_numbers_and_answer(question: str, answer: str | None, near: bool) -> None:
    find = Deduplicator(0.8)
    assert find(FIRST) is None
    refusal = find(problem(question, answer))
    assert bool(refusal) == near
    if refusal:
        assert refusal.cause == "near_duplicate"
        assert "of its word 3-grams are those of first" in refusal.reason


def test_gsm8k_keeps_its_problems_and_loses_copies_of_them(shared_data: Path) -> None:
    problems = load_problems("gsm8k", data_dir=str(shared_data), limit=800)
    find = Deduplicator(0.8)
    assert sum(find(each) is not None for each in problems) <= 1
    copies = [dataclasses.replace(each, id=f"{each.id}-copy", question=f"  {each.question} ") for each in problems]
    assert all(find(each) is not None for each in copies)
    rng = random.Random(0)
    reworded = []
    for each in problems:
        words = each.question.split()
        if len(words) >= 40:  # one word of forty is three 3-grams of about 38 on either side
            words[rng.randrange(len(words))] += "y"
            reworded.append(dataclasses.replace(each, question=" ".join(words)))
    found = sum(find(each) is not None for each in reworded)
    assert found / len(reworded) > 0.9, "a few are other problems now, because the word was a number"


def test_short_questions_are_compared_by_what_words_they_have() -> None:
    find = Deduplicator(0.8)
    assert find(problem("Why?")) is None
    assert find(problem("What is 2+2?")) is None
    assert find(problem("What is 2+3?")) is None


def test_errors_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Deduplicator(0.0)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingExtraError, match=r"trl-reasoning-distill\[data\]"):
        Deduplicator(0.8)
    assert Deduplicator(None)(FIRST) is None
