"""Calculations found in text and checked exactly; one kind of error per answer."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.errors import ERROR_KINDS, classify_error, find_equations


def verdicts(text: str) -> list[tuple[str, bool]]:
    return [(equation.text, equation.holds) for equation in find_equations(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So 12+7=19.", [("12 + 7 = 19", True)]),
        ("12 + 7 = 18", [("12 + 7 = 18", False)]),
        ("2 + 3 * 4 = 14", [("2 + 3 * 4 = 14", True)]),
        ("2 + 3 * 4 = 20", [("2 + 3 * 4 = 20", False)]),
        ("<<48/2=24>>24", [("48 / 2 = 24", True)]),
        ("$1,000 + $2.50 = $1,002.50", [("1000 + 2.50 = 1002.50", True)]),
        ("20 * .10 = 2.0", [("20 * .10 = 2.0", True)]),
        ("6 ÷ 4 = 1.5", [("6 / 4 = 1.5", True)]),
        (r"\(3 \times 4 = 13\)", [("3 * 4 = 13", False)]),
        ("3 x 4 = 12", [("3 * 4 = 12", True)]),
        ("3 − 5 = -2", [("3 - 5 = -2", True)]),
        ("48 clips / 2 = 24 clips", [("48 / 2 = 24", True)]),
        ("**3 + 4 = 8**", [("3 + 4 = 8", False)]),
        ("12+7=19-3=16", [("12 + 7 = 19", True), ("19 - 3 = 16", True)]),
        ("2*6 = 3*4 = 12", [("2 * 6 = 3", True), ("3 * 4 = 12", True)]),
        ("10/3 = 3.33", [("10 / 3 = 3.33", True)]),
        ("10/3 = 3.35", [("10 / 3 = 3.35", False)]),
        ("10/3 = 3", [("10 / 3 = 3", False)]),
        ("4.20+9.45+1.35=14.999999999999998", [("4.20 + 9.45 + 1.35 = 14.999999999999998", True)]),
    ],
)
def test_calculations_are_found_and_checked(text, expected):
    assert verdicts(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2x + 3 = 7 and x + 2 = 5 and 12 - x = 4",
        "2 * (3+4) = 14, (3+4) * 2 = 14",
        "2^3 + 1 = 9, 2**3 + 1 = 9",
        "20% * 50 = 10",
        "2 hours + 30 minutes = 150 minutes, 5 dozen * 12 = 60",
        "5 / 0 = 1",
        "3 + 4 >= 7, 3 + 4 != 8",
        "= = 5 = 5, x = 5",
        "9" * 40 + " + 1 = 2",
        "",
    ],
)
def test_what_cannot_be_read_for_certain_is_not_judged(text):
    assert verdicts(text) == []


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_any_true_calculation_holds_and_any_false_one_does_not(numbers, data):
    operators = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    expression = "".join(f"{n} {op} " for n, op in zip(numbers, operators, strict=False)) + str(numbers[-1])
    value = eval(expression)
    (true,) = find_equations(f"Then {expression} = {value}.")
    (false,) = find_equations(f"Then {expression} = {value + 1}.")
    assert true.holds
    assert true.value == Fraction(value)
    assert not false.holds


@given(st.text(alphabet="0123456789 +-*/=x.,()<>\n$%^a\\", max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_text_is_an_error(text):
    for equation in find_equations(text):
        assert isinstance(equation.holds, bool)


@pytest.mark.parametrize("pattern", ["1+", "=", "1=", "(", ",111", "1*1=", "x ", "**1", "9"])
@pytest.mark.timeout(120)  # quadratic time would take hours
def test_long_text_hangs_nothing(pattern):
    text = (pattern * 300_000)[:300_000] + "=1"
    assert all(isinstance(equation.holds, bool) for equation in find_equations(text))


def row(completion: str, answer: str | None = "5", **columns: Any) -> Prediction:
    given = {"status": "incorrect", "completion": completion, "extracted_answer": answer, "gold_answer": "19"} | columns
    return Prediction(model="m", problem_id="p", **given)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("correct", row("19", status="correct")),
        ("undecided", row("19", status="undecided")),
        ("undecided", row("19", status="undecided", reason="the model says: no result within 2 s")),
        ("timed out", row("19", status="undecided", timed_out=True)),
        ("truncated", row("12+7=18 and", finish_reason="length")),
        ("no answer", row("I do not know.", None)),
        ("no answer", row("I do not know.", "")),
        ("format", row("<think>12+7=19\n5")),
        ("format", row("</think><think>5")),
        ("format", row("12+7=19. It took 5 minutes.")),
        ("arithmetic slip", row("<think>12+7=18</think>\n18", "18")),
        ("wrong plan", row("<think>12-7=5</think>\n5")),
        ("wrong plan", row("5")),
        ("wrong plan", row("12-7=5</think>\n5")),
    ],
)
def test_kinds(kind, example):
    assert classify_error(example) == kind
    assert kind in ERROR_KINDS


def test_real_text_of_a_real_model(shared_data):
    """OpenAI's published GPT-3 answers to GSM8K: right answers hold next to no false calculation."""
    counts: Counter[str] = Counter()
    slips_in_right_answers = 0
    with open(shared_data / "model_outputs" / "openai_gpt3_gsm8k.jsonl", encoding="utf-8") as lines:
        for line in lines:
            published = json.loads(line)
            output = published["response"]
            is_right = published["published_correct"]
            status = "correct" if is_right else "incorrect"
            counts[
                classify_error(row(output, output.rpartition("A: ")[2], status=status, gold_answer=published["gold"]))
            ] += 1
            slips_in_right_answers += is_right and any(not equation.holds for equation in find_equations(output))
    assert counts["correct"] == 2001
    assert slips_in_right_answers <= 5  # each read by hand: the slip is real, the answer came out right all the same
    assert counts["arithmetic slip"] > 20
