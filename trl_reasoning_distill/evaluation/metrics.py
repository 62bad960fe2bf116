"""The metrics of one model, from its rows of `predictions.jsonl`.

With several samples per problem the accuracy is that of one sample, and beside it are

- `pass@k`, the chance that at least one of k samples is right: 1 − C(n − c, k) / C(n, k) with c of n samples right, the unbiased
  estimator of Chen et al. 2021 ("Evaluating Large Language Models Trained on Code", equation 1), averaged over problems;
- `maj@k`, the chance that the most frequent answer of k samples is right (Wang et al. 2023, "Self-Consistency"), over all subsets of
  k of the n samples, or many random ones; tied answers share the vote, and a sample without an answer votes for none.

Calibration asks whether the model knows when it is right: does the mean log-probability of its own text part right answers from
wrong ones? The area under the ROC curve is the chance that a right answer has the higher one; 0.5 is a coin.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rapidfuzz.fuzz import ratio
from scipy import stats

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.statistics import (
    Interval,
    Resampling,
    interval_without_spread,
    percentile_interval,
    wilson,
)
from trl_reasoning_distill.verification.verify import answer_key

FULL_STEPS = 3
FULL_WORDS = 20


@dataclasses.dataclass(frozen=True)
class ReasoningForm:
    """The form of one response.

    Attributes:
        has_think_tags: Whether it opens and closes a thought in tags.
        has_reasoning: Whether there is any text of reasoning before the answer.
        is_well_formed: Whether it keeps to its format from start to end.
        steps: Lines of the reasoning that hold at least one word or number; sentences, if it is all one line.
        words: Words of the reasoning.
        quality: The score described above, 0 to 1.
    """

    has_think_tags: bool
    has_reasoning: bool
    is_well_formed: bool
    steps: int
    words: int
    quality: float


def reasoning_form(text: str, response_format: ReasoningFormat | None = None) -> ReasoningForm:
    """Describe a response.

    Args:
        text: What the model wrote.
        response_format: How it was to write; default: think tags if the text has any, else plain text.
    """
    think = ReasoningFormat.preset("think")
    has_tags = 0 <= text.find(think.open_tag) < text.find(think.close_tag)
    if response_format is None:
        response_format = think if has_tags else ReasoningFormat.preset("plain")
    parsed = response_format.parse(text)
    reasoning = (parsed.reasoning or "").strip()
    steps, words = count_steps(reasoning), len(reasoning.split())
    structure = (bool(reasoning) + bool(reasoning and parsed.answer) + parsed.well_formed) / 3
    quality = (structure + min(1.0, steps / FULL_STEPS) + min(1.0, words / FULL_WORDS)) / 3
    return ReasoningForm(has_tags, bool(reasoning), parsed.well_formed, steps, words, quality)


def reasoning_metrics(texts: Iterable[str], response_format: ReasoningFormat | None = None) -> dict[str, float]:
    """Means over responses: shares with tags, with reasoning and well formed, steps, words, quality.

    Returns:
        `think_tag_rate`, `reasoning_rate`, `well_formed_rate`, `mean_steps`, `mean_words` and `quality`; all 0 without texts.
    """
    forms = [reasoning_form(text, response_format) for text in texts]

    def mean(name: str) -> float:
        return sum(float(getattr(form, name)) for form in forms) / max(len(forms), 1)

    return {
        "think_tag_rate": mean("has_think_tags"),
        "reasoning_rate": mean("has_reasoning"),
        "well_formed_rate": mean("is_well_formed"),
        "mean_steps": mean("steps"),
        "mean_words": mean("words"),
        "quality": mean("quality"),
    }


def count_steps(reasoning: str) -> int:
    """Lines that hold at least one word or number; sentences, if it is all one line."""
    lines = [line for line in reasoning.splitlines() if any(map(str.isalnum, line))]
    if len(lines) != 1:
        return len(lines)
    return sum(any(map(str.isalnum, sentence)) for sentence in re.split(r"[.!?;](?=\s|$)", lines[0]))


RESAMPLES = 10_000
_MAX_SUBSETS = 200  # of the samples of one problem, for maj@k
_CALIBRATION_BINS = 10


def summarize(rows: Sequence[Prediction], response_format: ReasoningFormat | None = None) -> dict[str, Any]:
    """The metrics of one model.

    `accuracy` is the share of *all* answers verified as correct. Undecided answers are neither right nor
    wrong: they are counted in `undecided`, and `accuracy_decided` leaves them out.

    Args:
        rows: The model's predictions.
        response_format: What the reasoning metrics hold responses against.

    Returns:
        `model_path`, `n` (problems), `samples` (per problem), `accuracy`, `ci95`, `correct`, `incorrect`, `undecided`,
        `timed_out`, `accuracy_decided`, `match`, `truncation_rate`, `no_answer_rate`, `undecided_rate`, `methods` and `rules`
        (counts), `mean_tokens`, `tokens`, `seconds`, `tokens_per_second`, `by_kind`, `reasoning`, `calibration` (`None` without
        log-probabilities), and `pass_at_k`, `maj_at_k` and `self_consistency` (`None` with one sample).
    """
    n = len(rows)
    statuses = Counter(row.status for row in rows)
    decided = n - statuses["undecided"]
    tokens, seconds = sum(row.num_tokens for row in rows), sum(row.seconds for row in rows)
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row.kind].append(row)
    return {
        "model_path": rows[0].model_path,
        **_accuracy(rows),
        "correct": statuses["correct"],
        "incorrect": statuses["incorrect"],
        "undecided": statuses["undecided"],
        "timed_out": sum(row.timed_out for row in rows),
        "accuracy_decided": statuses["correct"] / decided if decided else None,
        "match": _match(rows),
        "truncation_rate": sum(row.finish_reason == "length" for row in rows) / n,
        "no_answer_rate": sum(row.extracted_answer is None for row in rows) / n,
        "undecided_rate": statuses["undecided"] / n,
        "methods": dict(Counter(row.method for row in rows if row.status == "correct").most_common()),
        "rules": dict(Counter(row.rule for row in rows).most_common()),
        "mean_tokens": tokens / n,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "by_kind": {kind: _accuracy(part) for kind, part in sorted(by_kind.items())},
        "reasoning": reasoning_metrics((row.completion for row in rows), response_format),
        "calibration": calibration(rows),
        **_sampled(rows),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k samples is right, drawn without replacement from n of which `correct` are."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, found {n}.")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[str | None], right: Sequence[bool], k: int, *, seed: int = 0) -> float:
    """Chance that the most frequent answer of k samples is right.

    Args:
        votes: What each sample answered, equal for equal answers; `None` votes for nothing.
        right: Whether it was right.
        k: Samples that vote.
        seed: Of the random subsets, where there are more than a few hundred.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} needs at least {k} samples per problem, found {len(votes)}.")
    places = range(len(votes))
    if math.comb(len(votes), k) <= _MAX_SUBSETS:
        subsets = list(itertools.combinations(places, k))
    else:
        rng = random.Random(seed)
        subsets = [tuple(rng.sample(places, k)) for _ in range(_MAX_SUBSETS)]
    return math.fsum(_majority(votes, right, subset) for subset in subsets) / len(subsets)


def calibration(rows: Sequence[Prediction]) -> dict[str, Any] | None:
    """Whether the mean log-probability of a text predicts if its answer is right; `None` where none is known.

    Returns:
        `n`, `auroc` and `p` (Mann & Whitney 1947; both `None` if all are right or all wrong), the mean log-probability of right
        and of wrong answers, and `bins` of equally many answers: their bounds, size and accuracy.
    """
    known = [row for row in rows if row.mean_log_prob is not None and row.status != "undecided"]
    if not known:
        return None
    scores = np.array([row.mean_log_prob for row in known])
    right = np.array([row.status == "correct" for row in known])
    auroc, p = _auroc(scores, right)
    edges = np.array_split(np.argsort(scores, kind="stable"), min(_CALIBRATION_BINS, len(known)))
    return {
        "n": len(known),
        "auroc": auroc,
        "p": p,
        "mean_log_prob_right": float(scores[right].mean()) if right.any() else None,
        "mean_log_prob_wrong": float(scores[~right].mean()) if not right.all() else None,
        "bins": [
            {
                "log_prob": [float(scores[places].min()), float(scores[places].max())],
                "n": len(places),
                "accuracy": float(right[places].mean()),
            }
            for places in edges
        ],
    }


def _auroc(scores: np.ndarray, right: np.ndarray) -> tuple[float | None, float | None]:
    if right.all() or not right.any():
        return None, None
    test = stats.mannwhitneyu(scores[right], scores[~right])
    return float(test.statistic / (right.sum() * (~right).sum())), float(test.pvalue)


def _accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    """Share of correct answers and its interval: Wilson's, or a bootstrap over problems if they have several samples."""
    problems = _by_problem(rows)
    shares = [sum(_is_right(row) for row in answers) / len(answers) for answers in problems.values()]
    samples = max(map(len, problems.values()))
    if samples == 1:
        interval = wilson(sum(map(_is_right, rows)), len(rows))
        return {"n": len(problems), "samples": 1, "accuracy": sum(shares) / len(shares), "ci95": list(interval)}
    value, interval = _mean(shares)
    return {"n": len(problems), "samples": samples, "accuracy": value, "ci95": list(interval)}


def _match(rows: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy by how strict the comparison is, each including the one before; and how alike answer and gold are as text."""
    right = [row.method for row in rows if _is_right(row)]
    exact = right.count("exact")
    numeric = exact + right.count("numeric")
    alike = (ratio(row.extracted_answer or "", str(row.gold_answer).strip()) for row in rows)
    return {
        "exact": exact / len(rows),
        "numeric": numeric / len(rows),
        "symbolic": len(right) / len(rows),
        "fuzzy": math.fsum(alike) / 100 / len(rows),
    }


def _sampled(rows: Sequence[Prediction]) -> dict[str, Any]:
    """What only several samples per problem can show."""
    problems = _by_problem(rows)
    n = min(map(len, problems.values()))
    if n == 1:
        return {"pass_at_k": None, "maj_at_k": None, "self_consistency": None}
    right = [[_is_right(row) for row in answers] for answers in problems.values()]
    votes = [
        [answer_key(row.extracted_answer) if row.extracted_answer else None for row in answers]
        for answers in problems.values()
    ]
    passed, voted = {}, {}
    for k in sorted({*(2**power for power in range(n.bit_length()) if 2**power <= n), n}):
        passed[str(k)] = _estimate([pass_at_k(len(each), sum(each), k) for each in right])
        voted[str(k)] = _estimate(
            [maj_at_k(v, r, k, seed=i) for i, (v, r) in enumerate(zip(votes, right, strict=True))]
        )
    return {"pass_at_k": passed, "maj_at_k": voted, "self_consistency": _self_consistency(votes, right)}


def _self_consistency(votes: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """How often the samples of a problem agree, and whether agreement predicts if the majority is right."""
    agreement = np.array(
        [max(Counter(v for v in each if v is not None).values(), default=0) / len(each) for each in votes]
    )
    majority = np.array([_majority(v, r, range(len(v))) for v, r in zip(votes, right, strict=True)])
    auroc, p = _auroc(agreement, majority > 0.5)
    return {"agreement": float(agreement.mean()), "auroc": auroc, "p": p}


def _majority(votes: Sequence[str | None], right: Sequence[bool], places: Sequence[int]) -> float:
    """The share of the right ones among the most frequent answers of some samples."""
    count = Counter(votes[place] for place in places if votes[place] is not None)
    if not count:
        return 0.0
    most = max(count.values())
    tied = [vote for vote, times in count.items() if times == most]
    # Answers that only algebra finds equal have different votes; whether a vote is right is in its samples' own verdicts.
    shares = [np.mean([right[place] for place in places if votes[place] == vote]) for vote in tied]
    return float(np.mean(shares))


def _estimate(values: Sequence[float]) -> dict[str, Any]:
    value, interval = _mean(values)
    return {"value": value, "ci95": list(interval)}


def _mean(values: Sequence[float]) -> tuple[float, Interval]:
    """A mean over problems and its bootstrap interval."""
    scores = np.array([values])
    if np.ptp(scores) == 0:
        return float(scores[0, 0]), interval_without_spread(float(scores[0, 0]), len(values))
    means = Resampling({"": scores}, {"": ("",)}, resamples=RESAMPLES, seed=0).means[""]
    return float(scores.mean()), percentile_interval(means)


def _by_problem(rows: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    problems: dict[str, list[Prediction]] = {}
    for row in rows:
        problems.setdefault(row.problem_id, []).append(row)
    return problems


def _is_right(row: Prediction) -> bool:
    return row.status == "correct"
