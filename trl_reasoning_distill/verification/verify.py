r"""Is this answer right? `verify_answer(output, gold)` reads both answers whole and compares them by type; it never raises.

- **exact**: the same text in one writing; choices, words, dates.
- **numeric**: numbers, percentages, quantities, and tuples, sets, intervals and matrices of them.
- **symbolic**: expressions, equations and inequalities: by their values at a few points (see `values.py`); sums, integrals and limits by
  math-verify, in a worker process that is killed at the time-out (see `pool.py`).
- **fuzzy**: a word that resembles the gold word; incorrect, unless the caller asks for such words to count.

A verdict is `"undecided"` for an answer or gold answer that nothing reads whole, a time-out or a crash: those are nobody's mistake but ours, and are
counted by themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from trl_reasoning_distill.data.formatting import last_boxed
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.answers import Answer, Moment, Plain, Ratio, Text
from trl_reasoning_distill.verification.comparison import DEFAULT_TOLERANCE, Rules, compare, similarity
from trl_reasoning_distill.verification.expressions import Call, Number, Symbol
from trl_reasoning_distill.verification.extract import MAX_ANSWER, ExtractedAnswer, extract_answer, unescaped
from trl_reasoning_distill.verification.pool import Comparison, shared_pool
from trl_reasoning_distill.verification.reading import Reading, read
from trl_reasoning_distill.verification.typography import normalize
from trl_reasoning_distill.verification.values import exact_value

RESEMBLES = 80.0
"""Similarity, of 100, from which a wrong word is reported as a near miss."""
_MAX_WORKERS = 4
_INTEGER = re.compile(r"-?[0-9]{1,300}")
_DIGITS, _ROUNDED_DIGITS = 15, 6
"""Decimals to which math-verify rounds what it compares, and where one side is written with decimals."""


def verify_answer(
    output: str,
    gold: str | None,
    *,
    timeout: float = 2.0,
    tolerance: float = DEFAULT_TOLERANCE,
    fuzzy: float | None = None,
    units: Literal["compare", "ignore"] = "compare",
) -> Verdict:
    """Whether a model's output gives the gold answer.

    Args:
        output: The whole text of the model; the answer is extracted from what follows the reasoning.
        gold: The answer, or a solution that marks it with `####` or `\\boxed{}`; `None` is undecided.
        timeout: Seconds of computing that a symbolic comparison may take.
        tolerance: See `verify_answers`.
        fuzzy: See `verify_answers`.
        units: See `verify_answers`.

    Returns:
        The verdict; never an exception because of a text.
    """
    return verify_answers(
        [output], [gold], num_workers=1, timeout=timeout, tolerance=tolerance, fuzzy=fuzzy, units=units
    )[0]


def verify_answers(
    outputs: Sequence[str],
    golds: Sequence[str | None],
    *,
    num_workers: int | None = None,
    timeout: float = 2.0,
    tolerance: float = DEFAULT_TOLERANCE,
    fuzzy: float | None = None,
    units: Literal["compare", "ignore"] = "compare",
) -> list[Verdict]:
    """`verify_answer` of many, in order. Worker processes start only if some answer needs calculus.

    Args:
        outputs: The models' texts.
        golds: One gold answer for each.
        num_workers: Processes for what takes calculus; as many as there are cores, at most 4, if `None`.
        timeout: Seconds of computing per such comparison.
        tolerance: Of numbers that are written with decimals: relative, but absolute beside a gold answer that is an integer.
        fuzzy: Similarity, of 100, from which a word is taken for the gold word. By default it never is: a near miss is
            `incorrect`, with the method `fuzzy`.
        units: `compare` converts another unit and refuses another kind of unit; `ignore` compares the numbers alone.

    Raises:
        ValueError: If the two lists differ in length, or an option is out of range.
    """
    if len(outputs) != len(golds):
        raise ValueError(
            f"verify_answers needs one gold answer for each output; found {len(outputs)} outputs and {len(golds)} gold answers."
        )
    if timeout <= 0 or not 0 <= tolerance < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(
            f"Wanted timeout > 0, 0 ≤ tolerance < 1 and num_workers ≥ 1; found {timeout}, {tolerance} and {num_workers}."
        )
    if fuzzy is not None and not 0 < fuzzy <= 100:
        raise ValueError(f"Wanted 0 < fuzzy ≤ 100, or None; found {fuzzy}.")
    if units not in ("compare", "ignore"):
        raise ValueError(f"Wanted units 'compare' or 'ignore'; found {units!r}.")
    rules = Rules(tolerance, units, fuzzy)
    decided = [_decide(output, gold, rules) for output, gold in zip(outputs, golds, strict=True)]
    # Samples of one problem often give the same answer: each comparison is made once.
    pending = list(dict.fromkeys(item.comparison for item in decided if isinstance(item, _Pending)))
    found: dict[Comparison, Verdict] = {}
    if pending:
        outcomes = shared_pool(num_workers or min(_MAX_WORKERS, _core_count())).run(pending, timeout)
        for comparison, outcome in zip(pending, outcomes, strict=True):
            method = "none" if outcome.status == "undecided" else "symbolic"
            found[comparison] = Verdict(outcome.status, method, outcome.reason, timed_out=outcome.timed_out)  # type: ignore[arg-type]
    return [
        replace(found[item.comparison], extracted=item.extracted.answer, rule=item.extracted.rule)
        if isinstance(item, _Pending)
        else item
        for item in decided
    ]


def answer_key(answer: str) -> str:
    """A text that equal answers share, for counting votes: the number's value, or the answer in one writing.

    Coarser than `verify_answer`: expressions that only algebra finds equal have different keys.

    Args:
        answer: An extracted answer.
    """
    reading = read(answer)
    for found in reading.answers:
        value = getattr(found, "value", None)
        if isinstance(value, Number | Symbol | Call) and (exact := exact_value(value)) is not None:
            return str(exact)
        if isinstance(found, Text):
            return " ".join(found.words)
    return reading.text.replace(" ", "")


@dataclass(frozen=True)
class _Pending:
    """A comparison that takes calculus, and what was extracted for it."""

    comparison: Comparison
    extracted: ExtractedAnswer


def _decide(output: str, gold: str | None, rules: Rules) -> Verdict | _Pending:
    """The verdict, if it takes no calculus; else what the worker shall compare."""
    extracted = extract_answer(output)
    answer, rule = extracted.answer, extracted.rule

    def verdict(status: Literal["correct", "incorrect", "undecided"], method: str, reason: str) -> Verdict:
        return Verdict(status, method, reason, answer, rule)

    if gold is None or not gold.strip():
        return verdict("undecided", "none", "there is no gold answer")
    gold_answer = _gold_answer(gold)
    if len(gold_answer) > MAX_ANSWER:
        return verdict("undecided", "none", f"the gold answer is {len(gold_answer)} characters long")
    if answer is None:
        reason = "the reasoning never ended" if rule == "unfinished_reasoning" else "no answer was found"
        return verdict("incorrect", "none", reason)
    if len(answer) > MAX_ANSWER:
        return verdict("incorrect", "none", f"what is marked as the answer is {len(answer)} characters long")
    if _INTEGER.fullmatch(gold_answer) and _INTEGER.fullmatch(answer):
        if int(gold_answer) == int(answer):
            return verdict("correct", "exact", f"{answer!r:.80} is the gold answer")
        return verdict("incorrect", "numeric", f"{answer!r:.80} is not {gold_answer!r:.80}")
    gold_reading, reading = read(gold_answer), read(answer)
    if (
        not gold_reading.answers and not gold_reading.needs_calculus and " " in gold_answer
    ):  # a solution that marks nothing
        gold_answer = extract_answer(gold_answer).answer or gold_answer
        gold_reading = read(gold_answer)
    if gold_reading.needs_calculus or (reading.needs_calculus and gold_reading.answers):
        digits = _ROUNDED_DIGITS if "." in gold_answer + answer else _DIGITS
        return _Pending(Comparison(((_boxed(gold_answer), _boxed(answer)),), digits), extracted)
    return verdict(*_compare(reading, gold_reading, answer, gold_answer, rules))


def _compare(
    reading: Reading, gold: Reading, answer_text: str, gold_text: str, rules: Rules
) -> tuple[Literal["correct", "incorrect", "undecided"], str, str]:
    """Status, method and reason of two answers that take no calculus."""
    if _canonical(reading.text) == _canonical(gold.text):
        return "correct", "exact", f"{answer_text!r:.80} is the gold answer"
    if not gold.answers:
        return "undecided", "none", f"the gold answer could not be read whole: {gold.left_over!r:.40} was left over"
    if not reading.answers:
        if reading.is_senseless:
            return "incorrect", "none", f"{answer_text!r:.80} is no answer: {reading.left_over!r:.60}"
        if _is_impossible(gold, reading):
            return "incorrect", "none", f"{answer_text!r:.80} holds nothing like {gold_text!r:.80}"
        return (
            "undecided",
            "none",
            f"{answer_text!r:.80} could not be read whole: {reading.left_over!r:.40} was left over",
        )
    outcome, method = _compare_readings(gold, reading, rules)
    if outcome is None:
        return "undecided", "none", f"{answer_text!r:.80} could not be compared with {gold_text!r:.80}"
    if method == "text":
        return _compare_texts(gold, reading, outcome, rules)
    words = ("equals", "is not")[not outcome]
    return ("correct" if outcome else "incorrect"), method, f"{answer_text!r:.80} {words} {gold_text!r:.80}"


def _compare_readings(gold: Reading, reading: Reading, rules: Rules) -> tuple[bool | None, str]:
    """The best outcome over the readings. `10:20` and `20:40` are different times and equal ratios: nobody can tell."""
    outcomes: list[tuple[bool | None, str]] = []
    for left in gold.answers:
        for right in reading.answers:
            outcome = compare(left, right, rules)
            outcomes.append((outcome, _method(left, right)))
            if outcome:
                return outcomes[-1]
            if isinstance(left, Moment) and isinstance(right, Moment):
                as_ratios = (
                    compare(a, b, rules) for a in gold.answers for b in reading.answers if isinstance(a, Ratio)
                )
                return (None, "none") if any(as_ratios) else outcomes[-1]
    return (
        next((found for found in outcomes if found[0] is False and found[1]), outcomes[0])
        if any(found[0] is False for found in outcomes)
        else (None, "none")
    )


def _method(left: Answer, right: Answer) -> str:
    if isinstance(left, Text) and isinstance(right, Text):
        return "text"
    if type(left).__name__ in ("Choice", "Moment", "Statement", "Text"):
        return "exact"
    if type(left).__name__ in ("Equation", "Relation", "Family", "Congruence"):
        return "symbolic"
    return "symbolic" if _has_algebra(left) or _has_algebra(right) else "numeric"


def _has_algebra(answer: object) -> bool:
    """Whether an answer holds more than rational numbers."""
    if isinstance(answer, Call) and answer.name in ("matrix", "row"):
        return any(map(_has_algebra, answer.args))
    if isinstance(answer, Number | Symbol | Call):
        return exact_value(answer) is None
    if isinstance(answer, tuple):
        return any(map(_has_algebra, answer))
    fields = getattr(answer, "__dataclass_fields__", {})
    return any(_has_algebra(getattr(answer, name)) for name in ("value", "parts", "terms") if name in fields)


def _compare_texts(
    gold: Reading, reading: Reading, outcome: bool, rules: Rules
) -> tuple[Literal["correct", "incorrect"], str, str]:
    left, right = (next(a for a in side.answers if isinstance(a, Text)) for side in (gold, reading))
    if left.words == right.words:
        return "correct", "exact", f"{reading.text!r:.80} is the gold answer"
    score = similarity(left.words, right.words)
    if outcome:
        return "correct", "fuzzy", f"{reading.text!r:.80} resembles {gold.text!r:.80} ({score:.0f} of 100)"
    if score >= RESEMBLES:
        return "incorrect", "fuzzy", f"{reading.text!r:.80} only resembles {gold.text!r:.80} ({score:.0f} of 100)"
    return "incorrect", "exact", f"{reading.text!r:.80} is not {gold.text!r:.80}"


def _is_impossible(gold: Reading, reading: Reading) -> bool:
    """Whether an answer that was not read whole cannot be right: gold is a number, and its figures stand nowhere in the answer."""
    value = next((a.value for a in gold.answers if isinstance(a, Plain)), None)
    if not isinstance(value, Number):
        return False
    figures = re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?(?![A-Za-z\d])", reading.text.replace(",", ""))
    return not any(Fraction(figure) == abs(value.value) for figure in figures)


def _canonical(text: str) -> str:
    """A text in one writing without spaces, its words in lower case; single letters are variables and keep theirs."""
    text = re.sub(r"(?<![A-Za-z\\])[A-Za-z]{2,}", lambda match: match[0].lower(), text)
    return text.replace(" ", "").replace('"', "").rstrip(".")


def _gold_answer(gold: str) -> str:
    """A gold answer as it stands; a whole solution is read like a model's output."""
    gold = unescaped(gold)
    if "####" in gold or len(gold) > MAX_ANSWER or last_boxed(gold) is not None:
        return extract_answer(gold).answer or gold.strip()
    _, cut_box, rest = gold.rpartition("\\boxed{")  # a box that was cut off
    return (rest if cut_box else gold).strip()


def _boxed(answer: str) -> str:
    """An answer in a box, which math-verify reads whole."""
    return f"\\boxed{{{normalize(answer)}}}"


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
