r"""Is this answer right? `verify_answer(output, gold)` decides exact → numeric → symbolic, and never raises.

- **exact**: the same text, after white space, case, `$`, `\text{}` and the like; multiple choice by its letter; words.
- **numeric**: both are numbers (see `numbers.py`), or tuples, sets, intervals or matrices of numbers (see `structure.py`).
- **fuzzy**: a word that resembles the gold word; incorrect, unless the caller asks for such words to count.
- **symbolic**: math-verify, gold first, in a worker process that is killed at the time-out (see `pool.py`). The others take
  microseconds and no process.

A verdict is `"undecided"` for a time-out, a crash, or a gold answer that cannot be read: those are nobody's mistake but ours, and are
counted by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

from trl_reasoning_distill.data.formatting import last_boxed
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.compare import canonical, compare_plainly
from trl_reasoning_distill.verification.extract import MAX_ANSWER, ExtractedAnswer, committed_text, extract_answer
from trl_reasoning_distill.verification.numbers import parse_number
from trl_reasoning_distill.verification.pool import Comparison, shared_pool

DEFAULT_TOLERANCE = 1e-6
_MAX_WORKERS = 4
_WEAK_RULES = ("whole", "therefore", "math", "last_number")


def verify_answer(
    output: str,
    gold: str | None,
    *,
    timeout: float = 2.0,
    tolerance: float = DEFAULT_TOLERANCE,
    fuzzy: float | None = None,
) -> Verdict:
    """Whether a model's output gives the gold answer.

    Args:
        output: The whole text of the model; the answer is extracted from what follows the reasoning.
        gold: The answer, or a solution that marks it with `####` or `\\boxed{}`; `None` is undecided.
        timeout: Seconds of computing that a symbolic comparison may take.
        tolerance: See `verify_answers`.
        fuzzy: See `verify_answers`.

    Returns:
        The verdict; never an exception because of a text.
    """
    return verify_answers([output], [gold], num_workers=1, timeout=timeout, tolerance=tolerance, fuzzy=fuzzy)[0]


def verify_answers(
    outputs: Sequence[str],
    golds: Sequence[str | None],
    *,
    num_workers: int | None = None,
    timeout: float = 2.0,
    tolerance: float = DEFAULT_TOLERANCE,
    fuzzy: float | None = None,
) -> list[Verdict]:
    """`verify_answer` of many, in order. Worker processes start only if some answer needs algebra.

    Args:
        outputs: The models' texts.
        golds: One gold answer for each.
        num_workers: Processes for the symbolic comparisons; as many as there are cores, at most 4, if `None`.
        timeout: Seconds of computing per symbolic comparison.
        tolerance: Of numbers that are not both integers: relative, but absolute for a gold answer that is an integer; algebra rounds
            to as many decimals.
        fuzzy: Similarity, of 100, from which a word is taken for the gold word. By default it never is: a near miss is
            `incorrect`, with the method `fuzzy`.

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
    extracted = [extract_answer(output) for output in outputs]
    decided = [
        _decide(output, answer, gold, tolerance, fuzzy)
        for output, answer, gold in zip(outputs, extracted, golds, strict=True)
    ]
    # Samples of one problem often give the same answer: each comparison is made once.
    pending = list(dict.fromkeys(item for item in decided if isinstance(item, Comparison)))
    found: dict[Comparison, Verdict] = {}
    if pending:
        outcomes = shared_pool(num_workers or min(_MAX_WORKERS, _core_count())).run(pending, timeout)
        for comparison, outcome in zip(pending, outcomes, strict=True):
            method = "none" if outcome.status == "undecided" else "symbolic"
            found[comparison] = Verdict(outcome.status, method, outcome.reason, timed_out=outcome.timed_out)  # type: ignore[arg-type]
    verdicts = [found[item] if isinstance(item, Comparison) else item for item in decided]
    return [
        dataclasses.replace(verdict, extracted=answer.answer, rule=answer.rule)
        for verdict, answer in zip(verdicts, extracted, strict=True)
    ]


def answer_key(answer: str) -> str:
    """A text that equal answers share, for counting votes: the number's value, or the answer without its typography.

    Coarser than `verify_answer`: expressions that only algebra finds equal have different keys.

    Args:
        answer: An extracted answer.
    """
    number = parse_number(answer)
    return canonical(answer) if number is None else str(number.value)


def _decide(
    output: str, extracted: ExtractedAnswer, gold: str | None, tolerance: float, fuzzy: float | None
) -> Verdict | Comparison:
    """The verdict, if it takes no algebra; else what the worker shall compare."""
    if gold is None or not gold.strip():
        return Verdict("undecided", "none", "there is no gold answer")
    gold_answer = _gold_answer(gold)
    if len(gold_answer) > MAX_ANSWER:
        return Verdict("undecided", "none", f"the gold answer is {len(gold_answer)} characters long")
    answer = extracted.answer
    if answer is None:
        reason = "the reasoning never ended" if extracted.rule == "unfinished_reasoning" else "no answer was found"
        return Verdict("incorrect", "none", reason)
    if len(answer) > MAX_ANSWER:
        return Verdict("incorrect", "none", f"what is marked as the answer is {len(answer)} characters long")
    verdict = compare_plainly(answer, gold_answer, tolerance, fuzzy)
    if verdict is not None:
        return verdict
    return Comparison(_symbolic_pairs(output, answer, extracted.rule, gold, gold_answer), _decimals(tolerance))


def _gold_answer(gold: str) -> str:
    """A gold answer as it stands; a whole solution is read like a model's output."""
    if "####" in gold or len(gold) > MAX_ANSWER or last_boxed(gold) is not None:
        return extract_answer(gold).answer or gold.strip()
    return gold.strip()


def _symbolic_pairs(output: str, answer: str, rule: str, gold: str, gold_answer: str) -> tuple[tuple[str, str], ...]:
    """What math-verify compares: the two answers; and, if nothing marked the answer, the texts as they stand."""
    answers = (_as_latex(gold_answer), _as_latex(answer))
    text = committed_text(output) or ""
    if rule not in _WEAK_RULES or len(text) > MAX_ANSWER:
        return (answers,)
    return answers, (gold if len(gold) <= MAX_ANSWER else _as_latex(gold_answer), text)


def _as_latex(answer: str) -> str:
    """An answer in a math environment, which math-verify needs to read it as LaTeX."""
    if "$" in answer or "\\(" in answer or "\\[" in answer or "\\boxed" in answer:
        return answer
    return f"${answer}$"


def _decimals(tolerance: float) -> int:
    """The decimals to which math-verify rounds, which knows no relative tolerance."""
    return min(15, round(-math.log10(tolerance))) if tolerance else 15


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
