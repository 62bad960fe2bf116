"""Metrics of one model: estimators against counting by hand, and rows with nothing special about them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.metrics import (
    ReasoningForm,
    calibration,
    maj_at_k,
    pass_at_k,
    reasoning_form,
    reasoning_metrics,
    summarize,
)


def row(problem: str, sample: int, answer: str | None, gold: str = "7", **columns: Any) -> Prediction:
    right = answer is not None and answer.lstrip("0") == gold
    given: dict[str, Any] = {
        "model": "m",
        "model_path": "path",
        "problem_id": problem,
        "sample": sample,
        "gold_answer": gold,
        "completion": f"<think>\nso\n</think>\n\n{answer}" if answer else "<think>\nso",
        "extracted_answer": answer,
        "rule": "whole" if answer else "unfinished_reasoning",
        "status": "correct" if right else "incorrect",
        "method": ("exact" if answer == gold else "numeric") if right else "none",
        "finish_reason": "stop" if answer else "length",
        "num_tokens": 5,
        "seconds": 0.5,
    }
    return Prediction(**given | columns)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_maj_at_k_by_hand() -> None:
    votes, right = ["7", "7", "5", None], [True, True, False, False]
    assert maj_at_k(votes, right, 1) == pytest.approx(2 / 4)
    # Of the six pairs: (7,7) right, twice (7,5) tied, twice (7,none) right, (5,none) wrong.
    assert maj_at_k(votes, right, 2) == pytest.approx((1 + 2 * 0.5 + 2 * 1 + 0) / 6)
    assert maj_at_k(votes, right, 4) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0
    with pytest.raises(ValueError, match="maj@5 needs at least 5 samples"):
        maj_at_k(votes, right, 5)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 2, 5)


def test_random_subsets_stand_for_all_of_them() -> None:
    votes, right = ["7"] * 9 + ["5"] * 7, [True] * 9 + [False] * 7
    assert maj_at_k(votes, right, 1) == pytest.approx(9 / 16, abs=1e-9)
    assert maj_at_k(votes, right, 5) == pytest.approx(0.63, abs=0.08)  # hypergeometric, at least three of five
    assert maj_at_k(votes, right, 5) == maj_at_k(votes, right, 5)


def test_several_samples_give_pass_and_majority_with_intervals() -> None:
    answers = {"a": ["7", "7", "5", "07"], "b": ["5", "5", "7", None], "c": ["1", "2", "3", "4"], "d": ["7"] * 4}
    metrics = summarize([row(problem, i, answer) for problem, each in answers.items() for i, answer in enumerate(each)])
    assert (metrics["n"], metrics["samples"]) == (4, 4)
    assert metrics["accuracy"] == pytest.approx((3 / 4 + 1 / 4 + 0 + 1) / 4)
    assert metrics["accuracy"] == pytest.approx(metrics["pass_at_k"]["1"]["value"])
    assert metrics["pass_at_k"]["4"]["value"] == pytest.approx(3 / 4)
    assert metrics["maj_at_k"]["4"]["value"] == pytest.approx(2 / 4)
    for estimate in (*metrics["pass_at_k"].values(), *metrics["maj_at_k"].values()):
        assert 0 <= estimate["ci95"][0] <= estimate["value"] <= estimate["ci95"][1] <= 1
    assert metrics["self_consistency"]["agreement"] == pytest.approx((3 / 4 + 2 / 4 + 1 / 4 + 1) / 4)
    assert metrics["match"]["exact"] == pytest.approx(7 / 16)
    assert metrics["match"]["numeric"] == metrics["match"]["symbolic"] == pytest.approx(8 / 16)


def test_one_sample_has_neither() -> None:
    metrics = summarize([row("a", 0, "7"), row("b", 0, "70")])
    assert metrics["pass_at_k"] is metrics["maj_at_k"] is metrics["self_consistency"] is None
    assert metrics["calibration"] is None
    assert metrics["match"] == {
        "exact": 0.5,
        "numeric": 0.5,
        "symbolic": 0.5,
        "fuzzy": pytest.approx((1 + 2 / 3) / 2, abs=0.001),
    }


def test_calibration_is_the_chance_that_the_right_answer_is_the_likelier_one() -> None:
    rows = [row(str(i), 0, "7" if i >= 5 else "8", mean_log_prob=-2.0 + i / 10) for i in range(10)]
    found = calibration(rows)
    assert found is not None
    assert (found["auroc"], found["n"]) == (1.0, 10)
    assert found["p"] < 0.05
    assert found["mean_log_prob_right"] > found["mean_log_prob_wrong"]
    assert [bin_["accuracy"] for bin_ in found["bins"]] == [0.0] * 5 + [1.0] * 5
    backwards = calibration([dataclasses.replace(each, mean_log_prob=-(each.mean_log_prob or 0.0)) for each in rows])
    assert backwards is not None
    assert backwards["auroc"] == 0.0
    all_right = calibration(rows[5:])
    assert all_right is not None
    assert all_right["auroc"] is None


def test_a_time_out_is_counted_by_itself() -> None:
    late = row("a", 0, "7", status="undecided", method="none", timed_out=True)
    crash = row("b", 0, "7", status="undecided", method="none", reason="the worker died")
    metrics = summarize([late, crash, row("c", 0, "7")])
    assert (metrics["undecided"], metrics["timed_out"]) == (2, 1)


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
