"""Intervals and tests for answers that are right or wrong: over problems, over several trainings, over several samples.

What is known of a model is a matrix `(runs, problems)` of scores from 0 to 1: one row per training (seed), one column per
problem. Both are samples, of the trainings one might have run and the problems one might have asked, so a statement about the
*method* must carry the chance of both. With one run the problems alone are resampled, and the statement is about that one model.

- **Intervals** are percentile intervals of a crossed bootstrap: runs and problems are drawn with replacement, independently of
  each other (Owen 2007, "The pigeonhole bootstrap", slightly conservative). Models that share problems are resampled at the same
  problems, and models whose runs have the same names (`sft@0`, `distilled@0`) at the same runs: differences are paired in both.
- **Tests** are McNemar's exact one for one run and one sample, a paired permutation of problems for several samples, and for
  several runs a t-test with two-way clustered variance (Cameron, Gelbach & Miller 2011): variance between runs + between
  problems − the interaction that both hold, with Welch and Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]

CONFIDENCE = 0.95
_BATCH = 1_000  # bootstrap resamples at a time


def wilson(correct: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    interval = stats.binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided p-value of McNemar's exact test: are `fixed` heads in `fixed + broken` tosses those of a fair coin?"""
    discordant = fixed + broken
    return float(stats.binomtest(fixed, discordant, 0.5).pvalue) if discordant else 1.0


def paired_permutation(first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int) -> float:
    """Two-sided p-value when the two models' names are swapped at random within problems; `(problems,)` each."""
    result = stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_BATCH,
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def clustered_t_test(first: np.ndarray, second: np.ndarray, *, paired_runs: bool) -> float:
    """Two-sided p-value of "equally good" over runs and problems.

    Args:
        first: `(runs, problems)`.
        second: `(runs, problems)`; a model with one run is compared with each run of the other.
        paired_runs: Whether row r of both belongs together (the same seed).

    Returns:
        The p-value; 1 if the means are equal, and that of a t-test over problems alone if neither has several runs.
    """
    parts = [first - second] if paired_runs or 1 in (len(first), len(second)) else [first, second]
    difference = float(first.mean() - second.mean())
    per_problem = first.mean(0) - second.mean(0)
    problems = per_problem.size
    between_problems = _variance(per_problem) / problems
    between_runs = [_variance(part.mean(1)) / len(part) for part in parts]
    interaction = sum(float(part.var()) / part.size for part in parts if len(part) > 1)
    total = max(between_problems + sum(between_runs) - interaction, between_problems, *between_runs)
    if difference == 0 or total == 0:
        return 1.0 if difference == 0 else 0.0
    spread = between_problems**2 / max(problems - 1, 1)
    spread += sum(v**2 / (len(part) - 1) for v, part in zip(between_runs, parts, strict=True) if len(part) > 1)
    freedom = total**2 / spread if spread else math.inf
    return float(2 * stats.t.sf(abs(difference) / math.sqrt(total), max(freedom, 1.0)))


class Resampling:
    """Bootstrap resamples of the mean scores of several models, from which any interval follows.

    Args:
        scores: Model to `(runs, problems)`; the problems are the same for all.
        run_names: Model to the names of its runs; models with the same names are resampled at the same runs.
        resamples: How many.
        seed: The same scores and seed give the same resamples.

    Attributes:
        means: Model to `(resamples,)`, its mean in each resample.
    """

    def __init__(
        self, scores: Mapping[str, np.ndarray], run_names: Mapping[str, Hashable], *, resamples: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        problems = next(iter(scores.values())).shape[1]
        stacked = np.concatenate(list(scores.values())).T  # (problems, all runs of all models)
        by_run = np.concatenate([_counts(rng, problems, size) @ stacked for size in _batches(resamples)]) / problems
        drawn: dict[Hashable, np.ndarray] = {}
        self.means: dict[str, np.ndarray] = {}
        start = 0
        for model, values in scores.items():
            runs = len(values)
            names = run_names[model]
            if names not in drawn:
                drawn[names] = _counts(rng, runs, resamples) / runs if runs > 1 else np.ones((resamples, 1))
            self.means[model] = (by_run[:, start : start + runs] * drawn[names]).sum(1)
            start += runs


def percentile_interval(values: np.ndarray) -> Interval:
    """The interval that holds 95 % of the resamples."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval_without_spread(value: float, problems: int, lowest: float = 0.0) -> Interval:
    """An interval for a mean whose problems were all alike.

    A resample of equal values has no spread, but that a few problems were alike does not make it certain that all are: allow for
    as many exceptions as Wilson's interval does after none was seen.
    """
    unseen = wilson(0, problems)[1]
    return max(lowest, value - unseen), min(1.0, value + unseen)


def _counts(rng: np.random.Generator, items: int, size: int) -> np.ndarray:
    """How often each of `items` occurs in `size` draws with replacement: `(size, items)`."""
    drawn = rng.integers(0, items, (size, items)) + items * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items).astype(np.float64)


def _batches(resamples: int) -> Sequence[int]:
    return [_BATCH] * (resamples // _BATCH) + ([resamples % _BATCH] if resamples % _BATCH else [])


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0
