"""The hand-written cases, and what the reader makes of single answers."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from tests.verification.cases import OUTPUTS, RIGHT, UNCOMMITTED, WRONG
from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.answers import Plain, Quantity
from trl_reasoning_distill.verification.expressions import read_figure
from trl_reasoning_distill.verification.extract import rule_answers
from trl_reasoning_distill.verification.reading import read
from trl_reasoning_distill.verification.typography import normalize
from trl_reasoning_distill.verification.units import unit_named
from trl_reasoning_distill.verification.verify import verify_answer, verify_answers
from trl_reasoning_distill.verification.vocabulary import words_to_figures


def statuses(rows: list[tuple[str, str]], *, boxed: bool) -> list[tuple[tuple[str, str], Verdict]]:
    outputs = [f"\\boxed{{{output}}}" if boxed else output for output, _ in rows]
    return list(zip(rows, verify_answers(outputs, [gold for _, gold in rows]), strict=True))


def test_wrong_answers_are_never_correct() -> None:
    verdicts = statuses(WRONG, boxed=True)
    assert not [item for item in verdicts if item[1].status == "correct"]
    undecided = [row for row, verdict in verdicts if verdict.status == "undecided"]
    assert len(undecided) < 0.03 * len(WRONG), undecided


def test_right_answers_are_correct() -> None:
    assert not [item for item in statuses(RIGHT, boxed=True) if item[1].status != "correct"]


def test_answers_are_found_in_outputs() -> None:
    assert not [item for item in statuses(OUTPUTS, boxed=False) if item[1].status != "correct"]


def test_outputs_that_commit_to_nothing_or_something_else_are_never_correct() -> None:
    assert not [item for item in statuses(UNCOMMITTED, boxed=False) if item[1].status == "correct"]


def test_agrees_with_reported_answers(shared_data: Path) -> None:
    rows = [row for path in sorted((shared_data / "answers").glob("*.jsonl")) for row in read_jsonl(path)]
    verdicts = verify_answers([row["output"] for row in rows], [row["gold"] for row in rows], timeout=5.0)
    wrong = [(row["id"], v) for row, v in zip(rows, verdicts, strict=True) if v.status != row["expected"]]
    assert len(wrong) <= 0.01 * len(rows), wrong


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("1,234.5", Fraction("1234.5")), ("1.234,5", Fraction("1234.5")), ("12,34,567", 1234567), ("1 234,56", Fraction("1234.56")), ("1'234.56", Fraction("1234.56")),
        ("1.234.567", 1234567), ("1.234", Fraction("1.234")), ("2,74", Fraction("2.74")), ("0,111", Fraction("0.111")), ("1000,99", Fraction("1000.99")), ("6.02e23", 602 * 10**21), (".5", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)), ("007", 7), ("5.", 5), ("1e99999", None),
    ],
)  # fmt: skip
def test_figures(text: str, value: Fraction | int | None) -> None:
    number = read_figure(text)
    assert (number.value if number else None) == value


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("twenty-one", "21"), ("one hundred and five", "105"), ("two thousand and twenty", "2020"), ("two thirds", "2/3"), ("a half", "1/2"), ("three and a half", "(3 + 1/2)"),
        ("四十二", "42"), ("一百零五", "105"), ("两千", "2000"), ("12万", "120000"), ("1亿2000万", "120000000"), ("3.5亿", "350000000"), ("三分之二", "2/3"), ("百分之十五", "15%"), ("二〇二四", "2024"),
        ("负五", "-5"), ("zwölf", "12"), ("douze", "12"), ("двенадцать", "12"), ("five six", "five six"), ("someone", "someone"), ("3千米", "3千米"), ("none", "none"), ("tension", "tension"),
    ],
)  # fmt: skip
def test_number_words(text: str, figures: str) -> None:
    assert words_to_figures(text) == figures


@pytest.mark.parametrize(
    ("text", "left_over"),
    [
        ("5 apples^2", "apples"),
        ("5 \\frac", "the end"),
        ("(1, 2", "the end"),
        ("5 @ 6", "@"),
        ("x = ", "the end"),
        ("5 6", "6"),
        ("1 + + + + 2", "+"),
    ],
)
def test_what_is_left_over_is_reported(text: str, left_over: str) -> None:
    reading = read(text)
    assert reading.answers == ()
    assert reading.left_over == left_over
    verdict = verify_answer(f"\\boxed{{{text}}}", "5")
    assert verdict.status in ("undecided", "incorrect")
    assert verdict.status == "incorrect" or repr(left_over) in verdict.reason


def test_an_amount_in_two_units_is_one_amount() -> None:
    (amount,) = read("3 h 20 min").answers
    assert isinstance(amount, Quantity)
    assert verify_answer("\\boxed{12000 s}", "3 h 20 min").status == "correct"
    assert read("5m").answers != read("5 m").answers, "a letter that touches its number is a variable"
    assert isinstance(read("5m").answers[0], Plain)


def test_units_are_exact() -> None:
    mile, kilometre, hour = unit_named("miles"), unit_named("km"), unit_named("h")
    assert mile is not None
    assert kilometre is not None
    assert hour is not None
    assert mile.factor / kilometre.factor == Fraction("1.609344")
    assert unit_named("平方米") == unit_named("平方米")
    assert hour.dimension == (("s", 1),)
    assert unit_named("apples") is None


def test_units_may_be_ignored() -> None:
    assert verify_answer("\\boxed{5 km}", "5 m").status == "incorrect"
    assert verify_answer("\\boxed{5 km}", "5 m", units="ignore").status == "correct"
    with pytest.raises(ValueError, match="units"):
        verify_answer("5", "5", units="drop")  # type: ignore[arg-type]


def test_normalizing_drops_nothing_that_could_mean_something() -> None:
    assert normalize("$\\left(\\dfrac{1}{2},\\,3\\right)$") == "(\\frac{1}{2}, 3 )"
    assert normalize("（３，４）") == "(3,4)"
    assert normalize("10,\\!080") == "10080"
    assert normalize("\\text{ cm}^2") == '" cm" ^2'
    assert normalize("½ × ∞") == "1/2 \\times \\infty"


def test_a_verdict_holds_what_was_extracted_and_by_which_rule() -> None:
    verdict = verify_answer("The answer is 42 apples.", "42")
    assert (verdict.extracted, verdict.rule, verdict.timed_out) == ("42 apples", "answer_is", False)
    assert verify_answer("<think>5", "5").rule == "unfinished_reasoning"
    late = verify_answer("\\boxed{\\sum_{i=1}^{10^{12}} \\frac{\\sin(i^i)}{i}}", "3", timeout=0.5)
    assert (late.status, late.timed_out, late.rule) == ("undecided", True, "boxed")


def test_calculus_is_compared_whole_in_a_worker() -> None:
    pairs = [
        ("\\sum_{i=1}^{10} i", "55", True),
        ("\\sum_{i=1}^{10} i + 1", "55", False),
        ("\\int_0^1 x\\,dx", "\\frac12", True),
        ("1 + \\int", "1", False),
    ]
    verdicts = verify_answers([f"\\boxed{{{answer}}}" for answer, *_ in pairs], [gold for _, gold, _ in pairs])
    assert [verdict.status == "correct" for verdict in verdicts] == [right for *_, right in pairs]


def test_each_rule_by_itself() -> None:
    assert rule_answers("The answer is 5. So \\boxed{4}\n#### 3") == {"answer_is": "5", "boxed": "4", "hash": "3"}
    assert rule_answers("<think>\\boxed{4}") == {}


def test_plain_numbers_import_no_algebra() -> None:
    code = (
        "import sys, json; from trl_reasoning_distill import verify_answer; "
        "verify_answer('#### 42 apples', '42'); verify_answer('#### 1/2', '0.5'); verify_answer('#### 3 km', '3000 m'); "
        "print(json.dumps([name for name in ('sympy', 'mpmath', 'math_verify', 'torch') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
