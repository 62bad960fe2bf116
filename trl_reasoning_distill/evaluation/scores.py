"""Predictions arranged for comparison: a matrix of scores per model, runs × problems, and labels to part the problems by."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_reasoning_distill.data.schema import Prediction

RUN_MARK = "@"
"""`sft@3` is the run `3` of the model `sft`."""

_MAX_STEPS = 8  # problems with more steps than this are one part


@dataclasses.dataclass(frozen=True)
class Scores:
    """Share of right samples, per model, run and problem.

    Attributes:
        problem_ids: In order of appearance in the first model's rows.
        values: Model, in order of appearance, to `(runs, problems)`: 0 to 1, and 0 or 1 where each problem has one sample.
        runs: Model to the names of its runs; `("",)` for a model with one.
        labels: Dimension (`"kind"`, `"length"`, `"steps"`) to the label of each problem.
        undecided: Answers without a verdict, per model.
        samples: Samples per problem, the same for all.
    """

    problem_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    runs: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, ...]]
    undecided: dict[str, int]
    samples: int

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(self.values)

    @property
    def n(self) -> int:
        """Number of problems."""
        return len(self.problem_ids)

    def parts(self) -> dict[str, dict[str, Scores]]:
        """The same scores by dimension and label, without the dimensions in which all problems are alike."""
        return {
            dimension: {label: self._part(dimension, label) for label in _in_order(labels)}
            for dimension, labels in self.labels.items()
            if len(set(labels)) > 1
        }

    def changed(self, first: str, second: str) -> dict[str, list[str]]:
        """Problems on which the first model does better (`fixed`), and worse (`broken`), than the second."""
        difference = self.values[first].mean(0) - self.values[second].mean(0)
        return {
            "fixed": [self.problem_ids[index] for index in np.flatnonzero(difference > 0)],
            "broken": [self.problem_ids[index] for index in np.flatnonzero(difference < 0)],
        }

    def _part(self, dimension: str, label: str) -> Scores:
        keep = [index for index, each in enumerate(self.labels[dimension]) if each == label]
        return dataclasses.replace(
            self,
            problem_ids=tuple(self.problem_ids[index] for index in keep),
            values={model: values[:, keep] for model, values in self.values.items()},
            labels={name: tuple(labels[index] for index in keep) for name, labels in self.labels.items()},
        )


def collect_scores(predictions: Iterable[Prediction | Mapping[str, Any]]) -> Scores:
    """Arrange predictions as runs × problems per model, refusing what cannot be paired.

    Args:
        predictions: Predictions, or rows of such.

    Raises:
        ValueError: If there is no prediction, the models did not answer the same problems equally often, one answer occurs twice,
            or both `NAME` and `NAME@SEED` are among the models.
    """
    verdicts: dict[str, dict[str, dict[int, bool]]] = {}
    undecided: Counter[str] = Counter()
    first_of: dict[str, Prediction] = {}
    for row in predictions:
        each = row if isinstance(row, Prediction) else Prediction.from_row(row)
        answers = verdicts.setdefault(each.model, {}).setdefault(each.problem_id, {})
        if each.sample in answers:
            raise ValueError(
                f"The predictions hold sample {each.sample} of model {each.model!r} for problem {each.problem_id!r} twice; remove one "
                "of them."
            )
        answers[each.sample] = each.status == "correct"
        undecided[run_of(each.model)[0]] += each.status == "undecided"
        first_of.setdefault(each.problem_id, each)
    if not verdicts:
        raise ValueError(
            "There are no predictions to compare: predictions.jsonl is empty. Run the evaluate stage first."
        )
    problems = tuple(verdicts[next(iter(verdicts))])
    samples = _check(verdicts, problems)
    grouped = _group(tuple(verdicts))
    values = {
        name: np.array([[np.mean(list(verdicts[m][p].values())) for p in problems] for m in members])
        for name, members in grouped.items()
    }
    asked = [first_of[problem] for problem in problems]
    labels = {
        "steps": tuple(_step_label(each.reference_steps) for each in asked),
        "length": _length_labels([len(each.question.split()) for each in asked]),
        "kind": tuple(each.kind for each in asked),
    }
    runs = {name: tuple(run_of(member)[1] for member in members) for name, members in grouped.items()}
    return Scores(problems, values, runs, labels, {name: undecided[name] for name in grouped}, samples)


def run_of(name: str) -> tuple[str, str]:
    """`"sft@3"` as model `"sft"` and run `"3"`; a name without a mark is its own model, with the one run `""`."""
    model, _, run = name.partition(RUN_MARK)
    return (model, run) if model and run else (name, "")


def _group(names: Sequence[str]) -> dict[str, list[str]]:
    """Model to the names of its runs, sorted by run."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(run_of(name)[0], []).append(name)
    for model, members in grouped.items():
        if model in members and len(members) > 1:
            raise ValueError(
                f"The predictions hold the model {model!r} and also its runs {sorted(set(members) - {model})}; name that one {model}@SEED too."
            )
        members.sort(key=lambda name: (len(run_of(name)[1]), run_of(name)[1]))  # @2 before @10
    return grouped


def _check(verdicts: Mapping[str, Mapping[str, Mapping[int, bool]]], problems: Sequence[str]) -> int:
    """Refuse unequal problems or numbers of samples; return the number of samples."""
    first = next(iter(verdicts))
    for model, answered in verdicts.items():
        if apart := set(problems) ^ set(answered):
            raise ValueError(
                f"The models {first!r} and {model!r} did not answer the same problems: {len(apart)} were answered by only one of "
                f"them, such as {min(apart)!r}. Evaluate both on the same test set."
            )
    counts = {len(answers) for by_problem in verdicts.values() for answers in by_problem.values()}
    if len(counts) > 1:
        raise ValueError(
            f"The problems have between {min(counts)} and {max(counts)} samples; a paired comparison needs equally many of each."
        )
    return counts.pop()


def _length_labels(words: Sequence[int]) -> tuple[str, ...]:
    """Thirds of the problems by the words of their questions."""
    low, high = (int(np.quantile(words, share)) for share in (1 / 3, 2 / 3))
    if low == high:
        high = max(words)
    names = (f"≤ {low} words", f"{low + 1}–{high} words", f"> {high} words")
    return tuple(names[(count > low) + (count > high)] for count in words)


def _step_label(steps: int | None) -> str:
    if steps is None or steps < 1:
        return ""
    return f"> {_MAX_STEPS} steps" if steps > _MAX_STEPS else f"{steps} step{'s' if steps > 1 else ''}"


def _in_order(labels: Iterable[str]) -> list[str]:
    """Distinct labels; those with a number and a bound in the order of what they bound, the rest by name."""
    place = {"≤": 0, ">": 2}
    return sorted(set(labels), key=lambda label: (place.get(label[:1], 1), label))
