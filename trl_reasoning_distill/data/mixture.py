"""Several sources as one set of problems: so many from each, balanced by kind, in an order that the seed fixes.

    load_mixture({"numinamath_qwq": 5000, "gsm8k": 3000, "openr1_math": {"count": 1000, "balance_by_kind": True}}, seed=0)
    load_mixture({"gsm8k": {"weight": 3}, "svamp": {"weight": 1, "split": "train"}}, total=2000, data_dir="copies")

Each problem comes once, and none stands in an evaluation set: what is left out for that makes room for the source's next one.
A source that cannot be had is an error; or, if it names a `fallback`, that one takes its place, and this is said loudly.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from trl_reasoning_distill.data.decontamination import Decontaminator, Deduplicator, read_evaluation_sets
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.shapes import Demonstration, training_row
from trl_reasoning_distill.data.sources import (
    SOURCES,
    Cause,
    Refusal,
    RejectedRow,
    SourceRead,
    SourceUnavailableError,
    read_source,
)
from trl_reasoning_distill.data.synthetic import SOURCE_NAME as SYNTHETIC

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """One source of a mixture.

    Attributes:
        source: Name, path or `hub:` id, as `load_problems` takes it.
        count: How many problems; this or `weight`.
        weight: Share of the mixture's total, relative to the other weights.
        split: Which part of the source.
        balance_by_kind: Take as many of each kind as possible instead of the source's own proportions; reads the whole source.
        fallback: Source that takes its place if it cannot be had.
        options: Further options of the source.
    """

    source: str
    count: int | None = None
    weight: float | None = None
    split: str | None = None
    balance_by_kind: bool = False
    fallback: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.count is None) == (self.weight is None):
            raise ValueError(
                f"Give {self.source!r} in the mixture either a count or a weight; found {self.count} and {self.weight}."
            )
        if (self.count is not None and self.count < 1) or (self.weight is not None and self.weight <= 0):
            raise ValueError(
                f"{self.source!r} in the mixture needs a positive count or weight; found {self.count or self.weight}."
            )

    def splits_read(self) -> list[str]:
        """The named sources it may read from, as `name:split`."""
        names = [(self.source, self.split), (self.fallback, None)]
        return [
            f"{name}:{split or next(iter(SOURCES[name].splits))}" for name, split in names if name and name in SOURCES
        ]

    def read(
        self,
        count: int,
        seed: int,
        data_dir: str | None,
        admit: Callable[[Problem], Refusal | None],
        show_progress: bool,
    ) -> SourceRead:
        """At most `count` problems that `admit` lets in, from the source or from its fallback."""

        def read_from(source: str, split: str | None, options: Mapping[str, Any]) -> SourceRead:
            limit = None if self.balance_by_kind and source != SYNTHETIC else count
            if data_dir is not None and source in SOURCES:
                options = {"data_dir": data_dir, **options}
            return read_source(
                source, split=split, limit=limit, seed=seed, admit=admit, show_progress=show_progress, **options
            )

        try:
            read = read_from(self.source, self.split, self.options)
        except SourceUnavailableError as error:
            if self.fallback is None:
                raise
            logger.warning("%s CANNOT BE HAD (%s) AND IS REPLACED BY %s.", self.source, error, self.fallback)
            read = read_from(self.fallback, None, {})
        if not self.balance_by_kind:
            return read
        problems = list(read.problems)
        random.Random(seed).shuffle(problems)
        return SourceRead(balance_by_kind(problems, count), read.rejected)


@dataclass(frozen=True)
class Mixture:
    """Problems of several sources, shuffled.

    Attributes:
        problems: The problems.
        counts: Source to how many came.
        rejected: Which rows were left out, and why.
        evaluation_sets: What the problems were compared with, to its number of problems.
    """

    problems: list[Problem]
    counts: dict[str, int]
    rejected: list[RejectedRow]
    evaluation_sets: dict[str, int] = field(default_factory=dict)

    def left_out(self) -> dict[str, int]:
        """How many rows were left out, by cause; the contaminated ones also by evaluation set."""
        counts = Counter(dict.fromkeys(get_args(Cause), 0))
        for row in self.rejected:
            counts.update([row.cause, f"{row.cause} by {row.detail}"] if row.detail else [row.cause])
        return dict(counts)


class _Admission:
    """Asked about each problem: decontamination first, so that a duplicate of a refused problem is named contaminated too."""

    def __init__(self, decontaminator: Decontaminator | None, deduplicator: Deduplicator | None) -> None:
        self._filters = [each for each in (decontaminator, deduplicator) if each is not None]

    def __call__(self, problem: Problem) -> Refusal | None:
        return next((refusal for each in self._filters if (refusal := each(problem))), None)


def load_mixture(
    mixture: Mapping[str, int | Mapping[str, Any]],
    *,
    total: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    deduplicate: bool = True,
    near_duplicate_threshold: float | None = 0.8,
    decontaminate: bool | Sequence[str] = True,
    show_progress: bool = False,
) -> Mixture:
    """Read a mixture.

    Args:
        mixture: Source to its count, or to the fields of a `Component`.
        total: Problems in all, for the components with weights.
        seed: Of the samples and of the order.
        data_dir: Folder with local copies of named sources.
        deduplicate: Take each question once, over all sources; the first source named keeps it.
        near_duplicate_threshold: As `Deduplicator`: `None` leaves only exact duplicates out.
        decontaminate: Leave out problems of the evaluation sets: of all named ones (`True`), of those listed, or of none (`False`).
        show_progress: A bar for each source, with the time left.

    Raises:
        SourceUnavailableError: If a source without a fallback cannot be had.
        ValueError: If a component is wrong, weights stand without a total, or two sources share the id of a problem.
    """
    components = _parse(mixture)
    counts = _allot(components, total)
    decontaminator = None
    if decontaminate is not False:
        names = None if decontaminate is True else decontaminate
        trained_on = {name for component in components for name in component.splits_read()}
        decontaminator = Decontaminator(read_evaluation_sets(names, data_dir=data_dir, trained_on=trained_on))
    admit = _Admission(decontaminator, Deduplicator(near_duplicate_threshold) if deduplicate else None)
    problems: dict[str, Problem] = {}
    taken: dict[str, int] = {}
    rejected: list[RejectedRow] = []
    for component, count in zip(components, counts, strict=True):
        read = component.read(count, seed, data_dir, admit, show_progress)
        if len(read.problems) < count:
            logger.warning(
                "%s has %d problems, not the %d that the mixture asks for.",
                component.source,
                len(read.problems),
                count,
            )
        if doubled := [problem.id for problem in read.problems if problem.id in problems]:
            raise ValueError(
                f"The mixture holds the problem {doubled[0]!r} of {component.source!r} twice; give the files distinct ids."
            )
        problems |= {problem.id: problem for problem in read.problems}
        taken[component.source] = len(read.problems)
        rejected += read.rejected
    order = list(problems.values())
    random.Random(seed).shuffle(order)
    return Mixture(order, taken, rejected, decontaminator.sizes if decontaminator else {})


def balance_by_kind(problems: Sequence[Problem], count: int) -> list[Problem]:
    """At most `count` problems, as evenly over the kinds as they last; within a kind, the first ones."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    chosen: list[Problem] = []
    groups = sorted(by_kind.values(), key=len)
    for index, group in enumerate(groups):  # the rarest kind first: what it lacks, the others make up for
        share, extra = divmod(count - len(chosen), len(groups) - index)
        chosen += group[: share + bool(extra)]
    return chosen


def _parse(mixture: Mapping[str, int | Mapping[str, Any]]) -> list[Component]:
    if not mixture:
        raise ValueError("The mixture is empty; name at least one source and how many problems to take from it.")
    components = []
    for source, value in mixture.items():
        fields = {"count": value} if isinstance(value, int) else dict(value)
        known = set(Component.__dataclass_fields__) - {"source"}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"{source!r} in the mixture has the unknown settings {unknown}; there are {sorted(known)}."
            )
        components.append(Component(source, **fields))
    return components


def _allot(components: Sequence[Component], total: int | None) -> list[int]:
    """How many problems each component gives; weights share what the counts leave of the total, by largest remainder."""
    weights = sum(component.weight or 0 for component in components)
    fixed = sum(component.count or 0 for component in components)
    if weights and (total is None or total <= fixed):
        raise ValueError(
            f"Weights in a mixture need a total above the {fixed} problems that are counted; found {total}."
        )
    if not weights and total not in (None, fixed):
        raise ValueError(
            f"The counts of the mixture add up to {fixed}, not to the total of {total}; leave the total out, or use weights."
        )
    shares = [
        ((total or 0) - fixed) * component.weight / weights if component.weight else 0.0 for component in components
    ]
    counts = [component.count or int(share) for component, share in zip(components, shares, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda index: int(shares[index]) - shares[index])
    for index in by_remainder[: (total or fixed) - sum(counts)]:
        counts[index] += 1
    return counts


def worked_rows(
    problems: Iterable[Problem], response_format: ReasoningFormat
) -> tuple[list[dict[str, Any]], list[RejectedRow]]:
    """A training row for each problem that has a solution and an answer.

    Args:
        problems: Those without either give no row, and no reason: there is nothing to write.
        response_format: How the completions are written.

    Returns:
        Rows as `select` writes them (`prompt`, `completion`, `problem_id`, `kind`, `source`, `answer`), and the problems that this format
        cannot hold, with the reason.
    """
    rows, rejected = [], []
    for problem in problems:
        response = problem.response or problem.answer
        if problem.solution is None or response is None:
            continue
        demonstration = Demonstration(problem.question, problem.solution, response, problem.answer)
        try:
            row = training_row(demonstration, response_format)
        except ValueError as error:
            rejected.append(RejectedRow(problem.id, str(error), "not_rendered", problem.to_row()))
            continue
        rows.append(row | {"problem_id": problem.id, "kind": problem.kind, "source": problem.source})
    return rows, rejected
