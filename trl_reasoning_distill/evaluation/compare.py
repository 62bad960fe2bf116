"""Did it work? Models compared on the same problems, each difference with an interval and a test.

Every model answered every problem, so the comparison is *paired*: what counts is on how many problems one model is right
where the other is wrong, not how the two averages compare. For that the page gives the difference of the accuracies with a
bootstrap interval over problems, and McNemar's exact test of "neither is better". The gap recovered is

    (student − base) / (teacher − base)

the share of the way from the base student to its teacher; it is `None` where there is no way to go.

One training is one draw. Models named `NAME@SEED` are runs of one model, `NAME`: their accuracies are averaged, the interval is over
runs *and* problems, and so is the test (see `statistics.py`). Only such a comparison speaks of a method; one run of each speaks of
two models.

An undecided verdict (time-out, crash, unreadable gold) counts as not right, and is counted beside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.scores import Scores, collect_scores
from trl_reasoning_distill.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    Resampling,
    clustered_t_test,
    interval_without_spread,
    mcnemar_exact,
    paired_permutation,
    percentile_interval,
    wilson,
)

BASE, TEACHER, CONTROL, STUDENT = "base", "teacher", "sft", "distilled"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        accuracy: 0 to 1; the mean over runs, where there are several.
        ci95: Wilson's interval; with several samples per problem or several runs, a bootstrap interval over both.
        n: Number of problems.
        runs: Number of runs (trainings, seeds).
    """

    accuracy: float
    ci95: Interval
    n: int
    runs: int = 1


@dataclasses.dataclass(frozen=True)
class ModelResult(Accuracy):
    """What one model reached.

    Attributes:
        undecided: Answers without a verdict; they count as not right.
        gap_recovered: Share of the way from base to teacher; `None` for these two, and where it is undefined.
        gap_recovered_ci95: Its bootstrap interval; `None` where the way itself is too short to measure a share of it.
        by_run: Accuracy of each run, where there are several.
    """

    undecided: int = 0
    gap_recovered: float | None = None
    gap_recovered_ci95: Interval | None = None
    by_run: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """One model against another, problem by problem.

    Attributes:
        first: Name of the model that is asked about.
        second: Name of the model that it is compared with.
        difference: Accuracy of the first minus that of the second, −1 to 1.
        ci95: Bootstrap interval over problems, and over runs where there are several.
        p: Two-sided p-value of "neither is better"; not corrected for the number of comparisons.
        test: `"mcnemar_exact"`; `"paired_permutation"` where problems have several samples each; `"clustered_t"` over several runs.
        n: Number of problems.
        fixed: Problems on which the first is better than the second.
        broken: Problems on which it is worse.
        by_run: The difference in each run, where both models have the same ones.
    """

    first: str
    second: str
    difference: float
    ci95: Interval
    p: float
    test: str
    n: int
    fixed: int
    broken: int
    by_run: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_significant(self) -> bool:
        """Whether a difference this large would be rare (p < 0.05) if neither model were better."""
        return self.p < 1 - CONFIDENCE

    @property
    def problems_needed(self) -> int | None:
        """Problems needed to find a true difference of this size, in four of five tries; `None` if there is no difference.

        The usual normal approximation of McNemar's test at 5 % and a power of 80 % (Connor 1987), from the share of
        problems on which the two differ.
        """
        if self.difference == 0 or self.test != "mcnemar_exact":
            return None
        discordant, effect = (self.fixed + self.broken) / self.n, abs(self.difference)
        z_level, z_power = stats.norm.ppf([0.975, 0.8])
        root = z_level * discordant**0.5 + z_power * max(discordant - effect**2, 0.0) ** 0.5
        return int(np.ceil((root / effect) ** 2))


@dataclasses.dataclass(frozen=True)
class Part:
    """The comparison on some of the problems: accuracy per model, difference per pair."""

    models: dict[str, Accuracy]
    paired: dict[str, PairedDifference]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is compared: per model, per pair, and both again on parts of the problems.

    Attributes:
        models: Result per model, in the order base, control, student, any others, teacher.
        paired: Difference per pair, by the name `"<first>_vs_<second>"`.
        gap_recovered: Share of the gap between base and teacher that the student recovers.
        gap_recovered_ci95: Its interval.
        gap_left_by_control_recovered: Share of the gap between *control* and teacher that the student recovers.
        gap_left_by_control_recovered_ci95: Its interval.
        breakdowns: By what the problems are parted (`"kind"`, `"length"` of the question, `"steps"` of the reference solution),
            then by label; without those in which all problems are alike.
        changed: Problems of the headline pair: those that its first model `fixed`, and those it `broke`.
        roles: Which model plays `base`, `teacher`, `sft`, `distilled`; only those that are there.
        resamples: Bootstrap resamples behind each interval.
        seed: Seed of the resampling.
    """

    models: dict[str, ModelResult]
    paired: dict[str, PairedDifference]
    gap_recovered: float | None
    gap_recovered_ci95: Interval | None
    gap_left_by_control_recovered: float | None
    gap_left_by_control_recovered_ci95: Interval | None
    breakdowns: dict[str, dict[str, Part]]
    changed: dict[str, list[str]]
    roles: dict[str, str]
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain dictionaries, lists and numbers: the contents of `comparison.json`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @property
    def headline(self) -> PairedDifference | None:
        """The pair that answers the question of the whole run: student against control, else the first pair."""
        return headline_of(self.paired, self.roles)


def pair_name(first: str, second: str) -> str:
    """Key of a pair in `Comparison.paired`: `"distilled_vs_sft"`."""
    return f"{first}_vs_{second}"


def headline_of(paired: Mapping[str, PairedDifference], roles: Mapping[str, str]) -> PairedDifference | None:
    """Student against control, else the first pair."""
    asked = pair_name(roles.get(STUDENT, ""), roles.get(CONTROL, ""))
    return paired.get(asked) or next(iter(paired.values()), None)


def compare_models(
    predictions: Iterable[Prediction | Mapping[str, Any]],
    *,
    base: str = BASE,
    teacher: str = TEACHER,
    control: str = CONTROL,
    student: str = STUDENT,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare models that answered the same problems.

    Args:
        predictions: Predictions, or rows of an evaluation's `predictions.jsonl`: at least `model`, `problem_id`, `status`, and optionally
            `sample`, `kind`, `question` and `reference_steps`. With several samples per problem a problem's score is the share that
            is right. Models named `NAME@SEED` are runs of the model `NAME`.
        base: Name of the model that training started from.
        teacher: Name of the teacher.
        control: Name of the model trained on the text alone, with the same budget.
        student: Name of the distilled model. Any of the four may be absent; any other model is compared as a student too.
        resamples: Bootstrap resamples per interval.
        seed: Of the resampling; the same predictions and seed give the same numbers.

    Raises:
        ValueError: If there is no prediction, if the models did not answer the same problems equally often, or if one
            answer occurs twice.

    Source: McNemar 1947 (exact binomial form); Efron & Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927; Owen 2007;
    Cameron, Gelbach & Miller 2011.
    """
    scores = collect_scores(predictions)
    roles = {
        role: name
        for role, name in ((BASE, base), (TEACHER, teacher), (CONTROL, control), (STUDENT, student))
        if name in scores.models
    }
    pairs = comparison_pairs(scores.models, base=base, teacher=teacher, control=control, student=student)
    place = {base: 0, control: 1, student: 2, teacher: 4}
    order = sorted(scores.models, key=lambda name: place.get(name, 3))
    whole = _Comparer(scores, resamples, seed)
    models = {name: _model_result(whole, name, roles) for name in order}
    paired = whole.paired(pairs)
    beyond: tuple[float | None, Interval | None] = (None, None)
    if {TEACHER, CONTROL, STUDENT} <= roles.keys():
        beyond = whole.share_of_gap(student, control, teacher)
    headline = headline_of(paired, roles)
    distilled = models.get(student)
    return Comparison(
        models=models,
        paired=paired,
        gap_recovered=distilled.gap_recovered if distilled else None,
        gap_recovered_ci95=distilled.gap_recovered_ci95 if distilled else None,
        gap_left_by_control_recovered=beyond[0],
        gap_left_by_control_recovered_ci95=beyond[1],
        breakdowns=_breakdowns(scores, order, pairs, resamples, seed),
        changed=scores.changed(headline.first, headline.second) if headline else {},
        roles=roles,
        resamples=resamples,
        seed=seed,
    )


def comparison_pairs(
    models: Sequence[str], *, base: str = BASE, teacher: str = TEACHER, control: str = CONTROL, student: str = STUDENT
) -> list[tuple[str, str]]:
    """The pairs worth comparing: every student against control, base and teacher; control against base; student first.

    Where none of the roles is filled, every model is compared with the first.
    """
    references = [name for name in (control, base, teacher) if name in models]
    others = sorted((name for name in models if name not in references), key=lambda name: name != student)
    pairs = [(name, reference) for name in others for reference in references]
    if control in models and base in models:
        pairs.append((control, base))
    return pairs or [(name, models[0]) for name in models[1:]]


class _Comparer:
    """The statistics of some scores, all from one set of bootstrap resamples."""

    def __init__(self, scores: Scores, resamples: int, seed: int) -> None:
        self.scores, self.resamples, self.seed = scores, resamples, seed
        self.means = Resampling(scores.values, scores.runs, resamples=resamples, seed=seed).means

    def accuracy(self, name: str) -> Accuracy:
        """Mean score and its interval."""
        values = self.scores.values[name]
        runs, n = values.shape
        if runs == 1 and self.scores.samples == 1:
            return Accuracy(float(values.mean()), wilson(int(values.sum()), n), n)
        interval = self._interval(values, self.means[name], lowest=0.0)
        return Accuracy(float(values.mean()), interval, n, runs)

    def paired(self, pairs: Iterable[tuple[str, str]]) -> dict[str, PairedDifference]:
        """Differences by the names of their pairs."""
        return {pair_name(first, second): self._difference(first, second) for first, second in pairs}

    def share_of_gap(self, student: str, lower: str, upper: str) -> tuple[float | None, Interval | None]:
        """The share of the way from `lower` to `upper` that `student` has gone, and its interval."""
        s, low, high = (float(self.scores.values[name].mean()) for name in (student, lower, upper))
        if high <= low:
            return None, None
        share = (s - low) / (high - low)
        width = self.means[upper] - self.means[lower]
        if self.scores.n < 2 or percentile_interval(width)[0] <= 0:
            return share, None  # a share of something that may be nothing can be any number
        # In a resample without a gap (fewer than one in forty) nothing counts as recovered.
        shares = (self.means[student] - self.means[lower]) / np.where(width > 0, width, np.inf)
        return share, percentile_interval(shares)

    def _difference(self, first: str, second: str) -> PairedDifference:
        a, b = self.scores.values[first], self.scores.values[second]
        per_problem = a.mean(0) - b.mean(0)
        fixed, broken = int((per_problem > 0).sum()), int((per_problem < 0).sum())
        same_runs = self.scores.runs[first] == self.scores.runs[second]
        if len(a) > 1 or len(b) > 1:
            test, p = "clustered_t", clustered_t_test(a, b, paired_runs=same_runs)
        elif self.scores.samples > 1:
            test, p = "paired_permutation", paired_permutation(a[0], b[0], resamples=self.resamples, seed=self.seed)
        else:
            test, p = "mcnemar_exact", mcnemar_exact(fixed, broken)
        by_run = (
            zip(self.scores.runs[first], (a.mean(1) - b.mean(1)).tolist(), strict=True)
            if same_runs and len(a) > 1
            else ()
        )
        return PairedDifference(
            first=first,
            second=second,
            difference=float(per_problem.mean()),
            ci95=self._interval(per_problem[None], self.means[first] - self.means[second], lowest=-1.0),
            p=p,
            test=test,
            n=self.scores.n,
            fixed=fixed,
            broken=broken,
            by_run=dict(by_run),
        )

    def _interval(self, values: np.ndarray, resampled: np.ndarray, *, lowest: float) -> Interval:
        if np.ptp(values) == 0:
            return interval_without_spread(float(values.flat[0]), self.scores.n, lowest)
        return percentile_interval(resampled)


def _model_result(comparer: _Comparer, name: str, roles: Mapping[str, str]) -> ModelResult:
    gap: tuple[float | None, Interval | None] = (None, None)
    if name not in (roles.get(BASE), roles.get(TEACHER)) and {BASE, TEACHER} <= roles.keys():
        gap = comparer.share_of_gap(name, roles[BASE], roles[TEACHER])
    scores, result = comparer.scores, comparer.accuracy(name)
    by_run = dict(zip(scores.runs[name], scores.values[name].mean(1).tolist(), strict=True)) if result.runs > 1 else {}
    return ModelResult(result.accuracy, result.ci95, result.n, result.runs, scores.undecided[name], *gap, by_run)


def _breakdowns(
    scores: Scores, models: Sequence[str], pairs: Sequence[tuple[str, str]], resamples: int, seed: int
) -> dict[str, dict[str, Part]]:
    found: dict[str, dict[str, Part]] = {}
    for dimension, parts in scores.parts().items():
        found[dimension] = {}
        for label, part in parts.items():
            comparer = _Comparer(part, resamples, seed)
            accuracies = {name: comparer.accuracy(name) for name in models}
            found[dimension][label] = Part(accuracies, comparer.paired(pairs))
    return found
