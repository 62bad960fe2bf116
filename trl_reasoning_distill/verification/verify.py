r"""Is this answer right? `verify_answer(output, gold)` decides exact → numeric → symbolic, and never raises.

- **exact**: the same text, after white space, case, `$`, `\text{}` and the like; multiple choice by its letter.
- **numeric**: both are plain numbers (see `numbers.py`); no algebra, no process, microseconds.
- **symbolic**: math-verify, gold first, in a worker process that is killed at the time-out (see `pool.py`).

A verdict is `"undecided"` for a time-out, a crash, or a gold answer that cannot be read: those are nobody's mistake but ours, and are
counted by themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trl_reasoning_distill.data.formatting import last_boxed
from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.extract import MAX_ANSWER, committed_text, extract_answer, is_short
from trl_reasoning_distill.verification.numbers import Number, numbers_equal, parse_number
from trl_reasoning_distill.verification.pool import Comparison, shared_pool

DEFAULT_TOLERANCE = 1e-6
_MAX_WORKERS = 4
_WEAK_RULES = ("whole", "therefore", "math", "last_number")
_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textnormal|operatorname) ?\{([^{}]*)\}")
_IGNORED = re.compile(r"\\(?:left|right|!|,|;|:|quad|qquad)(?![A-Za-z])|[\s$~]|\\[()\[\] ]|\\displaystyle")
_CHOICE = re.compile(r"\(?([A-Ja-j])(?:\)|[.:](?:\s|$)|$)")


@dataclass(frozen=True)
class _Pending:
    """An item that only algebra can decide."""

    index: int
    comparison: Comparison


def verify_answer(output: str, gold: str | None, *, timeout: float = 2.0) -> Verdict:
    """Whether a model's output gives the gold answer.

    Args:
        output: The whole text of the model; the answer is extracted from what follows the reasoning.
        gold: The answer, or a solution that marks it with `####` or `\\boxed{}`; `None` is undecided.
        timeout: Seconds that a symbolic comparison may take.

    Returns:
        The verdict; never an exception because of a text.
    """
    return verify_answers([output], [gold], num_workers=1, timeout=timeout)[0]


def verify_answers(
    outputs: Sequence[str],
    golds: Sequence[str | None],
    *,
    num_workers: int | None = None,
    timeout: float = 2.0,
    tolerance: float = DEFAULT_TOLERANCE,
) -> list[Verdict]:
    """`verify_answer` of many, in order. Worker processes start only if some answer needs algebra.

    Args:
        outputs: The models' texts.
        golds: One gold answer for each.
        num_workers: Processes for the symbolic comparisons; as many as there are cores, at most 4, if `None`.
        timeout: Seconds per symbolic comparison.
        tolerance: Relative tolerance of numbers that are not both integers.

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
    verdicts: list[Verdict | None] = [None] * len(outputs)
    pending = []
    for index, (output, gold) in enumerate(zip(outputs, golds, strict=True)):
        decided = _decide(output, gold, tolerance)
        if isinstance(decided, Verdict):
            verdicts[index] = decided
        else:
            pending.append(_Pending(index, decided))
    if pending:
        pool = shared_pool(num_workers or min(_MAX_WORKERS, _core_count()))
        outcomes = pool.run([item.comparison for item in pending], timeout)
        for item, outcome in zip(pending, outcomes, strict=True):
            method = "none" if outcome.status == "undecided" else "symbolic"
            verdicts[item.index] = Verdict(outcome.status, method, outcome.reason)  # type: ignore[arg-type]
    return [verdict for verdict in verdicts if verdict is not None]


def answer_key(output: str) -> str | None:
    """A text that equal answers share, for counting votes: the number's value, or the answer without its typography.

    Coarser than `verify_answer`: expressions that only algebra finds equal have different keys.
    """
    answer = extract_answer(output).answer
    if answer is None:
        return None
    number = parse_number(answer)
    return _canonical(answer) if number is None else str(number.value)


def _decide(output: str, gold: str | None, tolerance: float) -> Verdict | Comparison:
    """The verdict, if it takes no algebra; else what the worker shall compare."""
    if gold is None or not gold.strip():
        return Verdict("undecided", "none", "there is no gold answer")
    gold_answer = _gold_answer(gold)
    if len(gold_answer) > MAX_ANSWER:
        return Verdict("undecided", "none", f"the gold answer is {len(gold_answer)} characters long")
    extracted = extract_answer(output)
    answer = extracted.answer
    if answer is None:
        reason = "the reasoning never ended" if extracted.rule == "unfinished_reasoning" else "no answer was found"
        return Verdict("incorrect", "none", reason)
    if len(answer) > MAX_ANSWER:
        return Verdict("incorrect", "none", f"what is marked as the answer is {len(answer)} characters long")
    if _canonical(answer) == _canonical(gold_answer):
        return Verdict("correct", "exact", f"{answer!r:.80} is the gold answer")
    choice = _CHOICE.fullmatch(_canonical_choice(gold_answer))
    if choice is not None:
        return _verify_choice(answer, choice.group(1).upper(), gold_answer)
    gold_number, number = parse_number(gold_answer), _answer_number(answer, gold_answer)
    if gold_number is not None and number is not None:
        if numbers_equal(number, gold_number, tolerance):
            return Verdict("correct", "numeric", f"{answer!r:.80} equals {gold_answer!r:.80}")
        if not (number.is_ambiguous or gold_number.is_ambiguous):
            return Verdict("incorrect", "numeric", f"{answer!r:.80} is not {gold_answer!r:.80}")
    if gold_number is not None and "\\" not in answer and not any(character.isdigit() for character in answer):
        return Verdict("incorrect", "numeric", f"{answer!r:.80} holds no number")
    return Comparison(_symbolic_pairs(output, answer, extracted.rule, gold, gold_answer))


def _gold_answer(gold: str) -> str:
    """A gold answer as it stands; a whole solution is read like a model's output."""
    if "####" in gold or len(gold) > MAX_ANSWER or last_boxed(gold) is not None:
        return extract_answer(gold).answer or gold.strip()
    return gold.strip()


def _symbolic_pairs(output: str, answer: str, rule: str, gold: str, gold_answer: str) -> list[tuple[str, str]]:
    """What math-verify compares: the two answers; and, if nothing marked the answer, the texts as they stand."""
    pairs = [(_as_latex(gold_answer), _as_latex(answer))]
    text = committed_text(output) or ""
    if rule in _WEAK_RULES and len(text) <= MAX_ANSWER:
        pairs.append((gold[:MAX_ANSWER] if len(gold) <= MAX_ANSWER else _as_latex(gold_answer), text))
    return pairs


def _as_latex(answer: str) -> str:
    """An answer in a math environment, which math-verify needs to read it as LaTeX."""
    if "$" in answer or "\\(" in answer or "\\[" in answer or "\\boxed" in answer:
        return answer
    return f"${answer}$"


def _answer_number(answer: str, gold_answer: str) -> Number | None:
    """The number in an answer: the answer itself, or the only number in a phrase without LaTeX such as `about 42 apples`."""
    number = parse_number(answer)
    if number is not None or "\\" in answer or ("$" in answer.strip("$") and not is_short(answer)):
        return number
    words = re.findall(r"[^\s=]*\d[^\s=]*", answer)
    return parse_number(words[0].strip("()*,;:!?\"'")) if len(words) == 1 else None


def _canonical(text: str) -> str:
    """A text without what carries no meaning: white space, math marks, font macros, case of words, a final full stop."""
    text = _MACRO.sub(r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = _IGNORED.sub("", text)
    # Case distinguishes variables (`A` and `a`), not words (`Even` and `even`).
    return re.sub(r"(?<!\\)\b[A-Za-z]{2,}\b", lambda match: match.group().lower(), text).rstrip(".")


def _canonical_choice(text: str) -> str:
    return _MACRO.sub(r"\1", text).strip("$ *\\()[]")


def _verify_choice(answer: str, gold_letter: str, gold_answer: str) -> Verdict | Comparison:
    """A gold answer of one letter may be a choice or a variable; a predicted choice decides, anything else is left to algebra."""
    predicted = _CHOICE.match(_canonical_choice(answer).lstrip("("))
    if predicted is None:
        return Comparison([(_as_latex(gold_answer), _as_latex(answer))])
    letter = predicted.group(1).upper()
    status = "correct" if letter == gold_letter else "incorrect"
    return Verdict(status, "exact", f"choice {letter}, gold {gold_letter}")  # type: ignore[arg-type]


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
