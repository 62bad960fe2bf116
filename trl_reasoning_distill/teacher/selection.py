"""From verified traces to training rows: which samples of a problem are worth learning from.

A trace can be selected if it is right, whole (not cut at the token limit) and well formed. Of these, a strategy takes
`per_problem` for each problem:

| strategy | takes |
|---|---|
| `first` | in the order they were drawn: an unbiased sample of the teacher's right answers |
| `shortest` | the fewest tokens |
| `median` | the length nearest to the median: neither terse nor rambling |
| `agreed` | the text most like the other right ones: the way that the teacher takes most often |
| `diverse` | first the median one, then each time the text least like those taken |
| `consensus` | the median one; for a problem without a gold answer, among the traces that give the majority's answer |
| `all` | every one |

Filtering by correctness favours easy problems. Each row therefore keeps its problem's pass rate; `easy_share` thins out the problems that the
teacher solves often, and `max_pass_rate` leaves out those that it nearly always solves.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import TrainingRow, VerifiedTrace
from trl_reasoning_distill.verification.extract import extract_answer
from trl_reasoning_distill.verification.verify import answer_key


@dataclass(frozen=True)
class SelectionConfig:
    """What to select, and how to write it.

    Attributes:
        strategy: One of `STRATEGIES`.
        per_problem: At most this many traces of a problem; `all` ignores it.
        source_format: The format that the traces were asked for in.
        target_format: The format of the training rows; the traces' own text is kept if it is `source_format`.
        max_pass_rate: Leave out problems of which a larger share of the traces is right.
        easy_share: Share of the problems to keep of which every trace is right; of those with the pass rate p, 1 − (1 − easy_share) · p are
            kept. Which ones depends on their ids alone, so a smaller share keeps a subset.
        min_agreement: For `consensus` without a gold answer: the share of the whole traces that must give the majority's answer.
    """

    strategy: str = "first"
    per_problem: int = 1
    source_format: ReasoningFormat = field(default_factory=lambda: ReasoningFormat.preset("think"))
    target_format: ReasoningFormat | None = None
    max_pass_rate: float = 1.0
    min_agreement: float = 0.5
    easy_share: float = 1.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"Unknown strategy {self.strategy!r}; there are {list(STRATEGIES)}.")
        if self.per_problem < 1:
            raise ValueError(f"per_problem must be at least 1, found {self.per_problem}.")
        if not 0 < self.max_pass_rate <= 1 or not 0 <= self.min_agreement <= 1 or not 0 <= self.easy_share <= 1:
            raise ValueError(
                f"max_pass_rate must be in (0, 1], min_agreement and easy_share in [0, 1]; found {self.max_pass_rate}, "
                f"{self.min_agreement} and {self.easy_share}."
            )


@dataclass(frozen=True)
class Selection:
    """Training rows, and what was counted on the way.

    Attributes:
        rows: What to train on, with its problem's id, kind, source, gold answer and pass rate.
        counts: `problems`, `problems_kept`, `traces`, `correct`, `incorrect`, `undecided`; and of the correct ones `cut`, `malformed`,
            `too_easy`, `thinned_out`, `not_rendered`.
        pass_rates: Problem id to the share of its traces that are right; the lower, the harder.
    """

    rows: list[TrainingRow]
    counts: dict[str, int]
    pass_rates: dict[str, float]


def read_verified_traces(path: str | os.PathLike[str]) -> list[VerifiedTrace]:
    """The rows of `verdicts.jsonl`.

    Raises:
        ValueError: For a row that is none, with its number.
    """
    traces = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if "extracted_answer" not in row and "completion" in row:  # version 0.1.0 did not write it down
            row["extracted_answer"] = extract_answer(row["completion"]).answer
        traces.append(VerifiedTrace.from_row(row, f"{path}, row {number}"))
    return traces


def select_traces(traces: Iterable[VerifiedTrace], config: SelectionConfig) -> Selection:
    """Select training rows from verified traces; problems keep the order of their first trace."""
    by_problem: dict[str, list[VerifiedTrace]] = {}
    for trace in traces:
        by_problem.setdefault(trace.problem_id, []).append(trace)
    names = (
        "problems",
        "problems_kept",
        "traces",
        "correct",
        "incorrect",
        "undecided",
        "cut",
        "malformed",
        "too_easy",
        "thinned_out",
        "not_rendered",
    )
    counts = Counter(dict.fromkeys(names, 0))
    counts["problems"] = len(by_problem)
    rows, pass_rates = [], {}
    for problem_id, group in by_problem.items():
        group.sort(key=lambda trace: trace.sample)
        counts["traces"] += len(group)
        counts.update(trace.status for trace in group)
        right = [trace for trace in group if trace.status == "correct"]
        pass_rates[problem_id] = len(right) / len(group)
        if pass_rates[problem_id] > config.max_pass_rate:
            counts["too_easy"] += len(right)
            continue
        if _place(problem_id) < (1 - config.easy_share) * pass_rates[problem_id]:
            counts["thinned_out"] += len(right)
            continue
        candidates = right
        if config.strategy == "consensus" and group[0].gold_answer is None:
            candidates = _majority(group, config.min_agreement)
        candidates = _usable(candidates, counts)
        kept = []
        for trace in _ordered(candidates, config.strategy):
            row = _render(trace, config, pass_rates[problem_id], counts)
            if row is not None:
                kept.append(row)
            if config.strategy != "all" and len(kept) == config.per_problem:
                break
        counts["problems_kept"] += bool(kept)
        rows.extend(kept)
    return Selection(rows, dict(counts), pass_rates)


def is_reasoning_ok(completion: str, response_format: ReasoningFormat) -> bool:
    """Whether a completion keeps to its format and reasons at all."""
    parsed = response_format.parse(completion)
    return parsed.well_formed and bool(parsed.reasoning and parsed.reasoning.strip())


def _place(problem_id: str) -> float:
    """A number in [0, 1) that is the problem's own."""
    return int.from_bytes(hashlib.blake2b(problem_id.encode(), digest_size=6).digest(), "big") / 2**48


def _usable(candidates: Sequence[VerifiedTrace], counts: Counter[str]) -> list[VerifiedTrace]:
    usable = []
    for trace in candidates:
        if trace.finish_reason == "length":
            counts["cut"] += 1
        elif not trace.reasoning_ok:
            counts["malformed"] += 1
        else:
            usable.append(trace)
    return usable


def _majority(group: Sequence[VerifiedTrace], min_agreement: float) -> list[VerifiedTrace]:
    """The traces that give the most frequent answer, if enough of the whole ones do."""
    whole = [trace for trace in group if trace.finish_reason == "stop"]
    keys = [(answer_key(trace.extracted_answer) if trace.extracted_answer else None, trace) for trace in whole]
    votes = Counter(key for key, _ in keys if key is not None)
    if not votes:
        return []
    winner, agreeing = votes.most_common(1)[0]
    return [trace for key, trace in keys if key == winner] if agreeing / len(keys) >= min_agreement else []


def _by_distance_to_median(traces: Sequence[VerifiedTrace]) -> list[VerifiedTrace]:
    if not traces:
        return []
    median = statistics.median(trace.num_tokens for trace in traces)
    return sorted(traces, key=lambda trace: abs(trace.num_tokens - median))


def _by_agreement(traces: Sequence[VerifiedTrace]) -> list[VerifiedTrace]:
    """By their mean likeness to the others, the medoid first."""
    from rapidfuzz.process import cdist

    if len(traces) < 3:
        return _by_distance_to_median(traces)
    texts = [trace.completion for trace in traces]
    likeness = cdist(texts, texts, workers=1).mean(axis=1)  # to itself it is the same for all
    return [traces[index] for index in sorted(range(len(traces)), key=lambda index: -likeness[index])]


def _by_difference(traces: Sequence[VerifiedTrace]) -> list[VerifiedTrace]:
    """The median one, then greedily the one whose nearest neighbour among those taken is farthest."""
    from rapidfuzz.fuzz import ratio

    left = _by_distance_to_median(traces)
    taken = left[:1]
    left = left[1:]
    while left:
        farthest = min(left, key=lambda trace: max(ratio(trace.completion, other.completion) for other in taken))
        left.remove(farthest)
        taken.append(farthest)
    return taken


_ORDERS: Mapping[str, Callable[[Sequence[VerifiedTrace]], list[VerifiedTrace]]] = {
    "first": list,
    "shortest": lambda traces: sorted(traces, key=lambda trace: trace.num_tokens),
    "median": _by_distance_to_median,
    "agreed": _by_agreement,
    "diverse": _by_difference,
    "consensus": _by_distance_to_median,
    "all": list,
}
STRATEGIES = tuple(_ORDERS)


def _ordered(traces: Sequence[VerifiedTrace], strategy: str) -> list[VerifiedTrace]:
    """Best first, each text once."""
    distinct = {trace.completion: trace for trace in reversed(traces)}
    return _ORDERS[strategy](sorted(distinct.values(), key=lambda trace: trace.sample))


def _render(
    trace: VerifiedTrace, config: SelectionConfig, pass_rate: float, counts: Counter[str]
) -> TrainingRow | None:
    target = config.target_format or config.source_format
    completion = trace.completion
    if target.name != config.source_format.name:
        parsed = config.source_format.parse(completion)
        # A marker announces the bare answer; what follows the reasoning may be a sentence around it.
        answer = trace.extracted_answer if target.answer_prefix else parsed.answer
        try:
            completion = target.render(parsed.reasoning or "", answer or "")
        except ValueError:
            counts["not_rendered"] += 1
            return None
    return TrainingRow(
        prompt=target.messages(trace.question),
        completion=[{"role": "assistant", "content": completion}],
        answer=trace.gold_answer,
        problem_id=trace.problem_id,
        kind=trace.kind,
        source=trace.source,
        pass_rate=pass_rate,
    )
