"""What was found, in words and numbers for a reader, and how sure it is.

A difference is called one only if the paired test finds it (p < 0.05); otherwise the sentence is that nothing was found, how
often chance alone would do as much, and how many problems it would take to know.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from trl_reasoning_distill.evaluation.compare import (
    BASE,
    CONTROL,
    STUDENT,
    TEACHER,
    Comparison,
    Interval,
    PairedDifference,
)

Outcome = Literal["better", "worse", "unclear"]


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """The answer to "did it work?".

    Attributes:
        outcome: Of the headline pair; `"unclear"` too where there is nothing to compare.
        title: A few words.
        sentences: What it rests on, one fact each.
    """

    outcome: Outcome
    title: str
    sentences: tuple[str, ...]


def printable(text: str) -> str:
    """A text without the characters that no file or page can hold: control characters and halves of surrogate pairs."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)


def percent(share: float) -> str:
    """`0.514` as `51.4 %`."""
    return f"{100 * share:.1f} %".replace("-", "−")


def points(difference: float) -> str:
    """`-0.074` as `−7.4`, in points of accuracy."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def percent_interval(interval: Interval | None) -> str:
    """`(0.47, 0.559)` as `47.0 to 55.9`."""
    return "" if interval is None else " to ".join(f"{100 * limit:.1f}".replace("-", "−") for limit in interval)


def p_value(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def outcome_of(pair: PairedDifference) -> Outcome:
    """Whether the first model was found to be better or worse than the second, or neither."""
    if not pair.is_significant:
        return "unclear"
    return "better" if pair.difference > 0 else "worse"


def title_of(pair: PairedDifference) -> str:
    """What was found for a pair, in a few words."""
    first, second, size = label(pair.first), label(pair.second), f"{abs(100 * pair.difference):.1f} points"
    return {
        "better": _sentence(f"{first} is better than {second} by {size}"),
        "worse": _sentence(f"{first} is worse than {second} by {size}"),
        "unclear": f"No difference was found between {first} and {second}",
    }[outcome_of(pair)]


def describe_pair(pair: PairedDifference) -> str:
    """What was found for a pair in full: the difference, its interval, the test, and the problems behind it."""
    measured = f"{points(pair.difference)} points, " if outcome_of(pair) == "unclear" else ""
    return f"{title_of(pair)} ({measured}95 % interval {percent_interval(pair.ci95)}; {_evidence(pair)}."


def find(comparison: Comparison) -> Conclusion:
    """The finding of a comparison: its headline pair, the gap to the teacher, and what limits both."""
    pair = comparison.headline
    if pair is None:
        (name, result), *_ = comparison.models.items()
        text = f"{label(name)} is right on {percent(result.accuracy)} (95 % interval {percent_interval(result.ci95)})"
        return Conclusion(
            "unclear", _sentence(text), ("There is no second model to compare it with.", *_caveats(comparison))
        )
    first, second = (percent(comparison.models[name].accuracy) for name in (pair.first, pair.second))
    text = f"{first} against {second} (difference {points(pair.difference)} points, 95 % interval {percent_interval(pair.ci95)}; "
    sentences = [text + _evidence(pair) + "."]
    if not pair.is_significant:
        sentences.append(_what_unclear_means(pair))
    return Conclusion(outcome_of(pair), title_of(pair), (*sentences, *_gap(comparison), *_caveats(comparison)))


def result_line(comparison: Comparison, report: str) -> str:
    """The report stage's result in one line; `report` is where the page lies."""
    pair = comparison.headline
    if pair is None:
        found = ", ".join(f"{label(name)} {percent(result.accuracy)}" for name, result in comparison.models.items())
        return f"{found}; report at {report}"
    first, second = (comparison.models[name].accuracy for name in (pair.first, pair.second))
    low, high = (f"{100 * limit:.1f}" for limit in pair.ci95)
    return (
        f"{label(pair.first)} {percent(first)} vs {label(pair.second)} {percent(second)} "
        f"({100 * pair.difference:+.1f} points [{low}, {high}], {p_value(pair.p)}); report at {report}"
    )


def label(name: str) -> str:
    """A model's name in a sentence."""
    return name.upper() if name == CONTROL else name


def _sentence(text: str) -> str:
    """Begin with a capital, unless it begins with a path or an identifier, whose case means something."""
    return text[0].upper() + text[1:] if text.split()[0].isalpha() else text


def _evidence(pair: PairedDifference) -> str:
    test = {
        "mcnemar_exact": "McNemar's exact test",
        "paired_permutation": "paired permutation test",
        "clustered_t": "t-test over runs and problems",
    }[pair.test]
    does = "is right" if pair.test == "mcnemar_exact" else "does better"
    text = (
        f"{p_value(pair.p)}, {test}): on {pair.fixed:,} of {pair.n:,} problems only {label(pair.first)} {does}, "
        f"on {pair.broken:,} only {label(pair.second)}"
    )
    if not pair.by_run:
        return text
    return f"{text}; by run {', '.join(points(difference) for difference in pair.by_run.values())}"


def _what_unclear_means(pair: PairedDifference) -> str:
    chance = f"If neither were better, chance alone would show a difference at least this large in {100 * pair.p:.0f} of 100 comparisons."
    needed = pair.problems_needed
    if needed is None or needed <= pair.n:
        return chance
    digits = max(0, len(str(needed)) - 2)
    return f"{chance} If the true difference is this large, it takes about {round(needed, -digits):,} problems to find it (power 80 %)."


def _gap(comparison: Comparison) -> list[str]:
    roles, share = comparison.roles, comparison.gap_recovered
    if STUDENT not in roles or BASE not in roles or TEACHER not in roles:
        return []
    if share is None:
        text = f"{label(roles[TEACHER])} is not better than {label(roles[BASE])} here, so there is no gap to recover."
        return [_sentence(text)]
    interval = comparison.gap_recovered_ci95
    sure = f" (95 % interval {percent_interval(interval)})" if interval else " (too small a gap for an interval)"
    text = f"{label(roles[STUDENT])} recovers {percent(share)} of the gap between {label(roles[BASE])} and {label(roles[TEACHER])}{sure}"
    control = comparison.models[roles[CONTROL]].gap_recovered if CONTROL in roles else None
    text += f"; {label(roles[CONTROL])} recovers {percent(control)}" if control is not None else ""
    return [_sentence(text) + ".", *_gap_left(comparison)]


def _gap_left(comparison: Comparison) -> list[str]:
    """What the student recovers of what text alone leaves undone."""
    share, interval = comparison.gap_left_by_control_recovered, comparison.gap_left_by_control_recovered_ci95
    if share is None or interval is None:
        return []
    control, student = label(comparison.roles[CONTROL]), label(comparison.roles[STUDENT])
    text = (
        f"Of the gap that {control} leaves to {label(comparison.roles[TEACHER])}, {student} recovers {percent(share)}"
    )
    return [f"{text} (95 % interval {percent_interval(interval)})."]


def _caveats(comparison: Comparison) -> list[str]:
    undecided = {name: result.undecided for name, result in comparison.models.items() if result.undecided}
    if not undecided:
        return []
    text = ", ".join(f"{count} of {label(name)}" for name, count in undecided.items())
    return [f"Answers the verifier could not decide count as not right: {text}."]
