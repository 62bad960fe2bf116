"""Did it work? Models compared on the same problems, each difference with an interval and a test.

Every model answered every problem, so the comparison is *paired*: what counts is on how many problems one model is right
where the other is wrong, not how the two averages compare. For that the page gives the difference of the accuracies with a
bootstrap interval over problems, and McNemar's exact test of "neither is better". The gap recovered is

    (student − base) / (teacher − base)

the share of the way from the base student to its teacher; it is `None` where there is no way to go.

An undecided verdict (time-out, crash, unreadable gold) counts as not right, and is counted beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Interval = tuple[float, float]

CONFIDENCE = 0.95
BASE, TEACHER, CONTROL, STUDENT = "base", "teacher", "sft", "distilled"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        accuracy: 0 to 1.
        ci95: Wilson's interval; with several samples per problem, a bootstrap interval over problems.
        n: Number of problems.
    """

    accuracy: float
    ci95: Interval
    n: int


@dataclasses.dataclass(frozen=True)
class ModelResult(Accuracy):
    """What one model reached.

    Attributes:
        undecided: Answers without a verdict; they count as not right.
        gap_recovered: Share of the way from base to teacher; `None` for these two, and where it is undefined.
        gap_recovered_ci95: Its bootstrap interval; `None` where the way itself is too short to measure a share of it.
    """

    undecided: int = 0
    gap_recovered: float | None = None
    gap_recovered_ci95: Interval | None = None


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """One model against another, problem by problem.

    Attributes:
        first: Name of the model that is asked about.
        second: Name of the model that it is compared with.
        difference: Accuracy of the first minus that of the second, −1 to 1.
        ci95: Bootstrap interval over problems.
        p: Two-sided p-value of "neither is better"; not corrected for the number of comparisons.
        test: `"mcnemar_exact"`, or `"paired_permutation"` where problems have several samples each.
        n: Number of problems.
        fixed: Problems on which the first is better than the second.
        broken: Problems on which it is worse.
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
class Comparison:
    """All that is compared: per model, per pair, and both again per kind of problem.

    Attributes:
        models: Result per model, in the order base, control, student, any others, teacher.
        paired: Difference per pair, by the name `"<first>_vs_<second>"`.
        gap_recovered: Share of the gap between base and teacher that the student recovers.
        gap_recovered_ci95: Its interval.
        gap_left_by_control_recovered: Share of the gap between *control* and teacher that the student recovers.
        models_by_kind: `{kind: {model: Accuracy}}`; empty if all problems are of one kind.
        paired_by_kind: `{kind: {pair: PairedDifference}}`.
        roles: Which model plays `base`, `teacher`, `sft`, `distilled`; only those that are there.
        resamples: Bootstrap resamples behind each interval.
        seed: Seed of the resampling.
    """

    models: dict[str, ModelResult]
    paired: dict[str, PairedDifference]
    gap_recovered: float | None
    gap_recovered_ci95: Interval | None
    gap_left_by_control_recovered: float | None
    models_by_kind: dict[str, dict[str, Accuracy]]
    paired_by_kind: dict[str, dict[str, PairedDifference]]
    roles: dict[str, str]
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain dictionaries, lists and numbers: the contents of `comparison.json`."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    @property
    def headline(self) -> PairedDifference | None:
        """The pair that answers the question of the whole run: student against control, else the first pair."""
        asked = pair_name(self.roles.get(STUDENT, ""), self.roles.get(CONTROL, ""))
        return self.paired.get(asked) or next(iter(self.paired.values()), None)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Share of right samples, per model and problem.

    Attributes:
        models: Names, in order of appearance.
        problem_ids: In order of appearance in the first model's rows.
        kinds: `Problem.kind` of each problem.
        values: `(models, problems)`, 0 to 1; 0 or 1 where each problem has one sample.
        undecided: Answers without a verdict, per model.
        samples: Samples per problem, the same for all.
    """

    models: tuple[str, ...]
    problem_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    values: np.ndarray
    undecided: dict[str, int]
    samples: int

    def of(self, model: str) -> np.ndarray:
        """`(problems,)`, the scores of one model."""
        row: np.ndarray = self.values[self.models.index(model)]
        return row

    def of_kind(self, kind: str) -> Scores:
        """The same scores, on the problems of one kind."""
        keep = [index for index, each in enumerate(self.kinds) if each == kind]
        return dataclasses.replace(
            self,
            problem_ids=tuple(self.problem_ids[index] for index in keep),
            kinds=(kind,) * len(keep),
            values=self.values[:, keep],
        )


def pair_name(first: str, second: str) -> str:
    """Key of a pair in `Comparison.paired`: `"distilled_vs_sft"`."""
    return f"{first}_vs_{second}"


def compare_models(
    predictions: Iterable[Mapping[str, Any]],
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
        predictions: Rows of an evaluation's `predictions.jsonl`: at least `model`, `problem_id`, `status`, and optionally
            `kind` and `sample`. With several samples per problem a problem's score is the share that is right.
        base: Name of the model that training started from.
        teacher: Name of the teacher.
        control: Name of the model trained on the text alone, with the same budget.
        student: Name of the distilled model. Any of the four may be absent; any other model is compared as a student too.
        resamples: Bootstrap resamples per interval.
        seed: Of the resampling; the same predictions and seed give the same numbers.

    Raises:
        ValueError: If there is no prediction, if the models did not answer the same problems equally often, or if one
            answer occurs twice.

    Source: McNemar 1947 (exact binomial form); Efron & Tibshirani 1993, chapter 13 (percentile bootstrap); Wilson 1927.
    """
    scores = collect_scores(predictions)
    roles = {
        role: name
        for role, name in ((BASE, base), (TEACHER, teacher), (CONTROL, control), (STUDENT, student))
        if name in scores.models
    }
    pairs = comparison_pairs(scores.models, base=base, teacher=teacher, control=control, student=student)
    place = {base: 0, control: 1, student: 2, teacher: 4}
    resampling = {"resamples": resamples, "seed": seed}

    models = {}
    for name in sorted(scores.models, key=lambda name: place.get(name, 3)):
        gap: tuple[float | None, Interval | None] = (None, None)
        if name not in (base, teacher) and base in roles.values() and teacher in roles.values():
            gap = _gap_recovered(scores.of(name), scores.of(base), scores.of(teacher), **resampling)
        result = _accuracy(scores.of(name), scores.samples, **resampling)
        models[name] = ModelResult(result.accuracy, result.ci95, result.n, scores.undecided[name], *gap)

    beyond_control = None
    if {teacher, control, student} <= set(scores.models):
        beyond_control = _share_of_gap(*(float(scores.of(name).mean()) for name in (student, control, teacher)))

    kinds = sorted(set(scores.kinds))
    by_kind = {kind: scores.of_kind(kind) for kind in kinds} if len(kinds) > 1 else {}
    return Comparison(
        models=models,
        paired=_paired(scores, pairs, **resampling),
        gap_recovered=models[student].gap_recovered if student in models else None,
        gap_recovered_ci95=models[student].gap_recovered_ci95 if student in models else None,
        gap_left_by_control_recovered=beyond_control,
        models_by_kind={
            kind: {name: _accuracy(part.of(name), part.samples, **resampling) for name in models}
            for kind, part in by_kind.items()
        },
        paired_by_kind={kind: _paired(part, pairs, **resampling) for kind, part in by_kind.items()},
        roles=roles,
        **resampling,
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


def collect_scores(predictions: Iterable[Mapping[str, Any]]) -> Scores:
    """Arrange predictions as models × problems, refusing what cannot be paired; errors as in `compare_models`."""
    verdicts: dict[str, dict[str, dict[Any, bool]]] = {}
    undecided: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for row in predictions:
        model, problem, sample = row["model"], row["problem_id"], row.get("sample", 0)
        answers = verdicts.setdefault(model, {}).setdefault(problem, {})
        if sample in answers:
            raise ValueError(
                f"The predictions hold sample {sample} of model {model!r} for problem {problem!r} twice; remove one of them."
            )
        answers[sample] = row["status"] == "correct"
        undecided[model] = undecided.get(model, 0) + (row["status"] == "undecided")
        kinds[problem] = row.get("kind") or ""
    if not verdicts:
        raise ValueError(
            "There are no predictions to compare: predictions.jsonl is empty. Run the evaluate stage first."
        )

    models = tuple(verdicts)
    problems = tuple(verdicts[models[0]])
    for model in models[1:]:
        if apart := set(problems) ^ set(verdicts[model]):
            raise ValueError(
                f"The models {models[0]!r} and {model!r} did not answer the same problems: {len(apart)} were answered by only one of "
                f"them, such as {min(apart)!r}. Evaluate both on the same test set."
            )
    counts = {len(answers) for by_problem in verdicts.values() for answers in by_problem.values()}
    if len(counts) > 1:
        raise ValueError(
            f"The problems have between {min(counts)} and {max(counts)} samples; a paired comparison needs equally many of each."
        )
    values = np.array([[np.mean(list(verdicts[m][p].values())) for p in problems] for m in models])
    return Scores(models, problems, tuple(kinds[problem] for problem in problems), values, undecided, counts.pop())


def _accuracy(scores: np.ndarray, samples: int, *, resamples: int, seed: int) -> Accuracy:
    n = len(scores)
    if samples == 1:
        interval = stats.binomtest(int(scores.sum()), n).proportion_ci(CONFIDENCE, method="wilson")
        return Accuracy(float(scores.mean()), (float(interval.low), float(interval.high)), n)
    low, high = _bootstrap_mean(scores, lowest=0.0, resamples=resamples, seed=seed)
    return Accuracy(float(scores.mean()), (low, high), n)


def _paired(
    scores: Scores, pairs: Iterable[tuple[str, str]], *, resamples: int, seed: int
) -> dict[str, PairedDifference]:
    return {
        pair_name(first, second): _paired_difference(scores, first, second, resamples=resamples, seed=seed)
        for first, second in pairs
    }


def _paired_difference(scores: Scores, first: str, second: str, *, resamples: int, seed: int) -> PairedDifference:
    differences = scores.of(first) - scores.of(second)
    fixed, broken = int((differences > 0).sum()), int((differences < 0).sum())
    if scores.samples == 1:
        test, p = "mcnemar_exact", mcnemar_exact(fixed, broken)
    else:
        test, p = "paired_permutation", _permutation_p(scores.of(first), scores.of(second), resamples, seed)
    return PairedDifference(
        first=first,
        second=second,
        difference=float(differences.mean()),
        ci95=_bootstrap_mean(differences, lowest=-1.0, resamples=resamples, seed=seed),
        p=p,
        test=test,
        n=len(differences),
        fixed=fixed,
        broken=broken,
    )


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Two-sided p-value of McNemar's exact test: are `fixed` heads in `fixed + broken` tosses those of a fair coin?"""
    discordant = fixed + broken
    return float(stats.binomtest(fixed, discordant, 0.5).pvalue) if discordant else 1.0


def _permutation_p(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p-value when the two models' names are swapped at random within problems."""
    result = stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _bootstrap_mean(values: np.ndarray, *, lowest: float, resamples: int, seed: int) -> Interval:
    """Interval of a mean over problems, for values between `lowest` and 1."""
    if np.ptp(values) == 0:
        # A resample of equal values has no spread, but that a few problems were alike does not make it certain that all
        # are: allow for as many exceptions as Wilson's interval does after none was seen.
        unseen = stats.binomtest(0, len(values)).proportion_ci(CONFIDENCE, method="wilson").high
        return max(lowest, float(values[0] - unseen)), min(1.0, float(values[0] + unseen))
    return _bootstrap(np.mean, values, resamples=resamples, seed=seed)


def _bootstrap(statistic: Callable[..., Any], *samples: np.ndarray, resamples: int, seed: int) -> Interval:
    """Percentile interval of a statistic, resampling problems: all samples are drawn at the same places."""
    result = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=1000,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _share_of_gap(student: float, lower: float, upper: float) -> float | None:
    return (student - lower) / (upper - lower) if upper > lower else None


def _gap_recovered(
    student: np.ndarray, base: np.ndarray, teacher: np.ndarray, *, resamples: int, seed: int
) -> tuple[float | None, Interval | None]:
    """The share of the gap that is recovered, and its interval."""
    share = _share_of_gap(float(student.mean()), float(base.mean()), float(teacher.mean()))
    if share is None or len(base) < 2:
        return share, None
    gap = _bootstrap_mean(teacher - base, lowest=-1.0, resamples=resamples, seed=seed)
    if gap[0] <= 0:  # a share of something that may be nothing can be any number
        return share, None

    def statistic(s: np.ndarray, b: np.ndarray, t: np.ndarray, axis: int = -1) -> np.ndarray:
        width = np.mean(t - b, axis=axis)
        # In a resample without a gap (fewer than one in forty, see above) nothing counts as recovered.
        return np.mean(s - b, axis=axis) / np.where(width > 0, width, np.inf)

    return share, _bootstrap(statistic, student, base, teacher, resamples=resamples, seed=seed)


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down, as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
