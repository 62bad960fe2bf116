"""Statistics with answers known by hand or by another road."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.evaluation.compare import compare_models, comparison_pairs
from trl_reasoning_distill.evaluation.statistics import mcnemar_exact


def rows(outcomes: dict[str, Iterable[int]], kinds: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Prediction rows from 1 (right), 0 (wrong) and -1 (undecided) per problem and model."""
    status = {1: "correct", 0: "incorrect", -1: "undecided"}
    kinds = list(kinds or [])
    return [
        {"model": model, "problem_id": f"p{i}", "kind": kinds[i] if kinds else "", "status": status[outcome]}
        for model, each in outcomes.items()
        for i, outcome in enumerate(each)
    ]


def table(both: int, fixed: int, broken: int, neither: int) -> dict[str, list[int]]:
    """A 2 × 2 table of paired outcomes as outcomes of `distilled` and `sft`."""
    return {
        "sft": [1] * both + [0] * fixed + [1] * broken + [0] * neither,
        "distilled": [1] * both + [1] * fixed + [0] * broken + [0] * neither,
    }


def test_mcnemar_by_hand():
    # 8 fixed, 2 broken: 2 · (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 2 · 56 / 1024
    assert mcnemar_exact(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar_exact(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(0, 0) == 1.0


@given(fixed=st.integers(0, 60), broken=st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_the_exact_binomial_tail(fixed, broken):
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n
    assert mcnemar_exact(fixed, broken) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact(fixed, broken) == pytest.approx(mcnemar_exact(broken, fixed))


def test_wilson_interval_of_a_known_share():
    # Wilson's interval of 8 in 10 at z = 1.959964, from its formula
    z, p, n = 1.959963984540054, 0.8, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    result = compare_models(rows({"m": [1] * 8 + [0] * 2})).models["m"]
    assert (result.accuracy, result.n) == (0.8, 10)
    assert result.ci95 == pytest.approx((centre - half, centre + half))


def test_difference_counts_and_test_of_a_pair():
    pair = compare_models(rows(table(both=40, fixed=20, broken=8, neither=32))).paired["distilled_vs_sft"]
    assert pair.difference == pytest.approx(0.12)
    assert (pair.fixed, pair.broken, pair.n, pair.test) == (20, 8, 100, "mcnemar_exact")
    assert pair.p == pytest.approx(mcnemar_exact(20, 8))
    # The bootstrap of a mean must agree with the normal approximation at this size.
    deviation = math.sqrt((0.28 - 0.12**2) / 100)
    assert pair.ci95[0] == pytest.approx(0.12 - 1.96 * deviation, abs=0.015)
    assert pair.ci95[1] == pytest.approx(0.12 + 1.96 * deviation, abs=0.015)


def test_pairing_tells_apart_what_averages_cannot():
    # Both 50 % against 60 %, but once on nearly the same problems and once on others.
    close = compare_models(rows(table(both=50, fixed=10, broken=0, neither=40))).paired["distilled_vs_sft"]
    apart = compare_models(rows(table(both=20, fixed=40, broken=30, neither=10))).paired["distilled_vs_sft"]
    assert close.difference == pytest.approx(apart.difference)
    assert close.is_significant
    assert not apart.is_significant
    assert close.ci95[1] - close.ci95[0] < apart.ci95[1] - apart.ci95[0]


def test_the_bootstrap_is_reproducible_and_the_seed_matters():
    predictions = rows(table(both=40, fixed=21, broken=9, neither=33))
    first, again, other = (compare_models(predictions, seed=seed, resamples=2000).to_dict() for seed in (0, 0, 1))
    assert first == again
    assert first["paired"] != other["paired"]


def test_agreement_on_few_problems_is_not_certainty():
    pair = compare_models(rows(table(both=5, fixed=0, broken=0, neither=5))).paired["distilled_vs_sft"]
    assert pair.difference == 0.0
    assert pair.p == 1.0
    assert pair.ci95[0] < -0.2 < 0.2 < pair.ci95[1]
    assert pair.problems_needed is None


def test_problems_needed_shrink_with_the_effect():
    small = compare_models(rows(table(both=400, fixed=30, broken=25, neither=545))).paired["distilled_vs_sft"]
    large = compare_models(rows(table(both=400, fixed=50, broken=5, neither=545))).paired["distilled_vs_sft"]
    # Connor's formula by hand for 30 fixed and 25 broken of 1000: discordant 0.055, effect 0.005
    expected = ((1.959964 * math.sqrt(0.055) + 0.841621 * math.sqrt(0.055 - 0.005**2)) / 0.005) ** 2
    assert small.problems_needed == pytest.approx(expected, rel=1e-3)
    assert large.problems_needed < 500 < small.problems_needed


def outcomes_with_gap(base: int, sft: int, distilled: int, teacher: int, n: int = 100) -> list[dict[str, Any]]:
    right = {"base": base, "sft": sft, "distilled": distilled, "teacher": teacher}
    return rows({name: [1] * k + [0] * (n - k) for name, k in right.items()})


def test_gap_recovered():
    comparison = compare_models(outcomes_with_gap(base=10, sft=40, distilled=70, teacher=90))
    assert comparison.gap_recovered == pytest.approx(0.75)
    assert comparison.models["sft"].gap_recovered == pytest.approx(0.375)
    assert comparison.gap_left_by_control_recovered == pytest.approx(0.6)
    low, high = comparison.gap_recovered_ci95
    assert 0.6 < low < 0.75 < high < 0.9
    assert comparison.models["base"].gap_recovered is comparison.models["teacher"].gap_recovered is None


@pytest.mark.parametrize("teacher", [10, 5])
def test_no_gap_to_recover(teacher):
    comparison = compare_models(outcomes_with_gap(base=10, sft=12, distilled=14, teacher=teacher))
    assert comparison.gap_recovered is None
    assert comparison.gap_recovered_ci95 is None


def test_a_gap_that_may_be_nothing_has_no_interval():
    comparison = compare_models(outcomes_with_gap(base=10, sft=10, distilled=11, teacher=12))
    assert comparison.gap_recovered == pytest.approx(0.5)
    assert comparison.gap_recovered_ci95 is None


def test_undecided_is_not_right_and_is_counted():
    result = compare_models(rows({"m": [1, 1, -1, 0]})).models["m"]
    assert (result.accuracy, result.undecided, result.n) == (0.5, 1, 4)


def test_by_kind():
    comparison = compare_models(rows({"sft": [1, 0, 0, 0], "distilled": [1, 1, 1, 0]}, kinds=["a", "b", "b", "b"]))
    assert comparison.breakdowns["kind"]["b"].models["distilled"].accuracy == pytest.approx(2 / 3)
    assert comparison.breakdowns["kind"]["b"].paired["distilled_vs_sft"].fixed == 2
    assert comparison.breakdowns["kind"]["a"].paired["distilled_vs_sft"].n == 1


def test_several_samples_per_problem_are_averaged_and_clustered():
    outcomes = {"sft": ([1, 0], [0, 0], [1, 1], [0, 0]), "distilled": ([1, 1], [1, 0], [1, 1], [1, 0])}
    predictions = [
        {"model": model, "problem_id": f"p{i}", "sample": j, "status": "correct" if right else "incorrect"}
        for model, problems in outcomes.items()
        for i, samples in enumerate(problems)
        for j, right in enumerate(samples)
    ]
    comparison = compare_models(predictions)
    pair = comparison.paired["distilled_vs_sft"]
    assert comparison.models["distilled"].n == 4
    assert pair.difference == pytest.approx(0.375)
    assert (pair.fixed, pair.broken, pair.test) == (3, 0, "paired_permutation")
    # Three problems differ: of the 2^3 ways to swap them, two are this extreme.
    assert pair.p == pytest.approx(2 / 8, abs=0.02)


def test_pairs_that_make_sense():
    assert comparison_pairs(["base", "teacher", "sft", "distilled"]) == [
        ("distilled", "sft"),
        ("distilled", "base"),
        ("distilled", "teacher"),
        ("sft", "base"),
    ]
    assert comparison_pairs(["a", "b", "c"]) == [("b", "a"), ("c", "a")]
    assert comparison_pairs(["a", "b"], control="a", student="b") == [("b", "a")]
    assert comparison_pairs(["only"]) == []


def test_any_names_can_play_the_roles():
    comparison = compare_models(rows({"x/0.5B": [0, 1], "x/0.5B+kd": [1, 1]}), control="x/0.5B", student="x/0.5B+kd")
    assert comparison.headline is comparison.paired["x/0.5B+kd_vs_x/0.5B"]
    assert (comparison.headline.first, comparison.headline.second) == ("x/0.5B+kd", "x/0.5B")


def test_comparison_json_has_the_promised_schema():
    result = json.loads(json.dumps(compare_models(outcomes_with_gap(10, 40, 70, 90)).to_dict(), allow_nan=False))
    assert set(result["models"]) == {"base", "teacher", "sft", "distilled"}
    for model in result["models"].values():
        assert model.keys() >= {"accuracy", "ci95", "n"}
        assert isinstance(model["accuracy"], float)
        assert isinstance(model["n"], int)
        assert model["ci95"][0] <= model["accuracy"] <= model["ci95"][1]
    assert {"distilled_vs_sft", "distilled_vs_base", "sft_vs_base", "distilled_vs_teacher"} == set(result["paired"])
    for pair in result["paired"].values():
        assert pair.keys() >= {"difference", "ci95", "p", "fixed", "broken", "n"}
        assert pair["ci95"][0] <= pair["difference"] <= pair["ci95"][1]
    assert isinstance(result["gap_recovered"], float)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_any_outcome_gives_numbers(outcomes):
    names = ("base", "teacher", "distilled")
    columns = {name: [int(row[i]) for row in outcomes] for i, name in enumerate(names)}
    comparison = compare_models(rows(columns), resamples=200)
    json.dumps(comparison.to_dict(), allow_nan=False)
    for pair in comparison.paired.values():
        assert -1 <= pair.ci95[0] <= pair.difference <= pair.ci95[1] <= 1
        assert 0 < pair.p <= 1


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        draws = generator.choice(4, size=150, p=[0.4, 0.2, 0.1, 0.3])  # both, fixed, broken, neither
        counts = np.bincount(draws, minlength=4).tolist()
        low, high = compare_models(rows(table(*counts)), resamples=1000, seed=trial).paired["distilled_vs_sft"].ci95
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_refuses_models_that_answered_other_problems():
    predictions = [*rows({"sft": [1, 0]}), *rows({"distilled": [1, 0, 1]})]
    with pytest.raises(ValueError, match=r"'sft' and 'distilled'.*1 were answered by only one.*'p2'"):
        compare_models(predictions)


def test_refuses_an_answer_that_occurs_twice():
    with pytest.raises(ValueError, match="twice"):
        compare_models([*rows({"sft": [1]}), *rows({"sft": [0]})])


def test_refuses_uneven_samples():
    predictions = [*rows({"sft": [1, 0]}), {"model": "sft", "problem_id": "p0", "sample": 1, "status": "correct"}]
    with pytest.raises(ValueError, match="between 1 and 2 samples"):
        compare_models(predictions)


def test_refuses_nothing():
    with pytest.raises(ValueError, match="no predictions"):
        compare_models([])


def test_runs_of_one_model_are_averaged_and_paired_by_seed():
    outcomes = {
        "base": [0] * 40,
        "sft@0": [1] * 10 + [0] * 30,
        "sft@1": [1] * 14 + [0] * 26,
        "distilled@1": [1] * 24 + [0] * 16,
        "distilled@0": [1] * 22 + [0] * 18,
        "teacher": [1] * 40,
    }
    comparison = compare_models(rows(outcomes))
    assert list(comparison.models) == ["base", "sft", "distilled", "teacher"]
    sft, pair = comparison.models["sft"], comparison.paired["distilled_vs_sft"]
    assert (sft.accuracy, sft.runs, sft.by_run) == (0.3, 2, {"0": 0.25, "1": 0.35})
    assert pair.difference == pytest.approx(0.275)
    assert pair.by_run == pytest.approx({"0": 0.3, "1": 0.25})
    assert pair.test == "clustered_t"
    assert pair.p < 0.01
    assert (pair.fixed, pair.broken) == (14, 0)
    assert comparison.gap_left_by_control_recovered == pytest.approx(0.275 / 0.7)
    assert comparison.changed["fixed"] == [f"p{i}" for i in range(10, 24)]
    with pytest.raises(ValueError, match="'sft' and also its runs"):
        compare_models(rows({"sft": [1], "sft@1": [1]}))


def test_problems_are_parted_by_length_and_steps():
    predictions = [
        row | {"question": "word " * (10 + i), "reference_steps": 2 + i // 10}
        for row in rows({"sft": [1] * 10 + [0] * 20, "distilled": [1] * 20 + [0] * 10})
        for i in [int(row["problem_id"][1:])]
    ]
    breakdowns = compare_models(predictions, resamples=200).breakdowns
    assert set(breakdowns) == {"length", "steps"}
    steps = breakdowns["steps"]
    assert list(steps) == ["2 steps", "3 steps", "4 steps"]
    assert [part.paired["distilled_vs_sft"].difference for part in steps.values()] == [0.0, 1.0, 0.0]
    assert [part.models["sft"].n for part in breakdowns["length"].values()] == [10, 10, 10]
    assert [label[0] for label in breakdowns["length"]] == ["≤", "2", ">"]
