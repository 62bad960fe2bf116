"""Intervals and tests against other roads to the same number, and against how often they are right in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trl_reasoning_distill.evaluation.statistics import (
    Resampling,
    clustered_t_test,
    percentile_interval,
)


def resample(scores, runs=None, resamples=4000, seed=0):
    runs = runs or {name: tuple(map(str, range(len(values)))) for name, values in scores.items()}
    return Resampling(scores, runs, resamples=resamples, seed=seed).means


def draw(rng, runs, problems, *, shift=0.0, run_spread=0.0, problem_spread=0.0, noise=1.0):
    """Scores with a known mean: run effects, problem effects, and noise."""
    return (
        shift
        + run_spread * rng.normal(size=(runs, 1))
        + problem_spread * rng.normal(size=(1, problems))
        + noise * rng.normal(size=(runs, problems))
    )


def test_one_run_is_the_bootstrap_over_problems_that_scipy_does():
    values = np.random.default_rng(1).random(150)
    own = percentile_interval(resample({"m": values[None]})["m"])
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, random_state=0
    ).confidence_interval
    assert own == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_models_are_resampled_at_the_same_problems_and_runs():
    values = np.random.default_rng(2).random((4, 60))
    means = resample({"a": values, "b": values + 0.25})
    np.testing.assert_allclose(means["b"] - means["a"], 0.25)
    unpaired = resample({"a": values, "b": values}, runs={"a": ("1", "2", "3", "4"), "b": ("5", "6", "7", "8")})
    assert (unpaired["b"] - unpaired["a"]).std() > 0


def test_several_runs_widen_the_interval_by_what_they_differ():
    rng = np.random.default_rng(3)
    alike, apart = draw(rng, 5, 400, run_spread=0.0), draw(rng, 5, 400, run_spread=0.5)
    narrow, wide = (np.diff(percentile_interval(resample({"m": each})["m"]))[0] for each in (alike, apart))
    assert wide > 3 * narrow


def test_the_t_test_is_the_usual_one_where_only_one_of_the_two_varies():
    rng = np.random.default_rng(4)
    over_runs = np.repeat(rng.normal(0.3, 1, size=(6, 1)), 50, axis=1)  # all problems alike
    expected = stats.ttest_1samp(over_runs[:, 0], 0).pvalue
    assert clustered_t_test(over_runs, np.zeros((6, 50)), paired_runs=True) == pytest.approx(expected)
    over_problems = rng.normal(0.1, 1, size=(1, 80))  # one run
    expected = stats.ttest_1samp(over_problems[0], 0).pvalue
    assert clustered_t_test(over_problems, np.zeros((1, 80)), paired_runs=True) == pytest.approx(expected)


def test_no_difference_is_no_evidence():
    values = np.random.default_rng(5).random((3, 20))
    assert clustered_t_test(values, values, paired_runs=True) == 1.0


@pytest.mark.parametrize(("run_spread", "problem_spread"), [(0.0, 0.0), (0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_the_test_errs_as_rarely_as_it_says_and_the_interval_covers(run_spread, problem_spread):
    rng = np.random.default_rng(6)
    trials, rejected, covered = 300, 0, 0
    for trial in range(trials):
        difference = draw(rng, 5, 80, run_spread=run_spread, problem_spread=problem_spread)
        rejected += clustered_t_test(difference, np.zeros_like(difference), paired_runs=True) < 0.05
        low, high = percentile_interval(resample({"m": difference}, resamples=300, seed=trial)["m"])
        covered += low <= 0 <= high
    assert rejected / trials <= 0.09
    assert covered / trials >= 0.86  # five runs are few for a bootstrap; the test above is the stricter one


def test_unpaired_runs_are_compared_too():
    rng = np.random.default_rng(7)
    first, second = draw(rng, 4, 100, shift=1.0, run_spread=0.2), draw(rng, 6, 100, run_spread=0.2)
    assert clustered_t_test(first, second, paired_runs=False) < 0.01
    assert clustered_t_test(second - second.mean(), first - first.mean(), paired_runs=False) > 0.9
