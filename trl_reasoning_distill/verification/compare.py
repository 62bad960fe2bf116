r"""Comparisons that need no algebra: the same text, a choice's letter, a number, a word, or several of them.

`compare_plainly(answer, gold)` takes microseconds and no process. It returns `None` where only algebra can tell.
"""

from __future__ import annotations

import re

from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.extract import is_short
from trl_reasoning_distill.verification.numbers import Number, numbers_equal, parse_number
from trl_reasoning_distill.verification.structure import parse_structure, structures_equal

RESEMBLES = 80.0
"""Similarity, of 100, from which a wrong word is reported as a near miss."""

_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textnormal|operatorname) ?\{([^{}]*)\}")
_IGNORED = re.compile(r"\\(?:left|right|!|,|;|:|quad|qquad)(?![A-Za-z])|[\s$~]|\\[()\[\] ]|\\displaystyle")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)|\{([^{}]{1,40})\})(?:(\d)|\{([^{}]{1,40})\})")
_BRACED = re.compile(r"([\^_])\{(\w)\}|(\\sqrt)(\w)")
_CDOT = re.compile(r"\\(?:cdot|times)(?=[\\A-Za-z(])")
_CHOICE = re.compile(r"\(?([A-Ja-j])(?:\)|[.:](?:\s|$)|$)")
_IN_BASE = re.compile(r"(\d[0-9A-Z]*)(?:_\{?(\d+)\}?)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_ARTICLE = re.compile(r"^(?:an?|the) ", re.IGNORECASE)
_DIGIT_WORD = re.compile(r"[^\s=]*\d[^\s=]*")


def compare_plainly(answer: str, gold: str, tolerance: float, fuzzy: float | None = None) -> Verdict | None:
    """Whether an extracted answer is the gold answer, or `None` if that takes algebra.

    Args:
        answer: What was extracted.
        gold: The gold answer.
        tolerance: Relative, for numbers that are not both integers.
        fuzzy: Similarity, of 100, from which a word counts as the gold word; `None`: it never does, and is only reported.
    """
    if canonical(answer) == canonical(gold):
        return Verdict("correct", "exact", f"{answer!r:.80} is the gold answer")
    choice = _CHOICE.fullmatch(_bare(gold))
    if choice is not None:
        return _compare_choices(answer, choice[1].upper())
    verdict = _compare_bases(answer, gold) or _compare_words(answer, gold, fuzzy)
    if verdict is not None:
        return verdict
    numeric = _compare_numbers(answer, gold, tolerance)
    if numeric is not None:
        return numeric
    several, gold_several = parse_structure(answer), parse_structure(gold)
    if several is None or gold_several is None:
        return None
    equal = structures_equal(several, gold_several, lambda a, b: _parts_equal(a, b, tolerance))
    if equal is None:
        return None
    status = "correct" if equal else "incorrect"
    return Verdict(status, "numeric", f"{answer!r:.80} {'equals' if equal else 'is not'} {gold!r:.80}, part by part")  # type: ignore[arg-type]


def canonical(text: str) -> str:
    """A text without what carries no meaning: white space, math marks, font macros, case of words, a final full stop."""
    text = _MACRO.sub(r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = _IGNORED.sub("", text)
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = _BRACED.sub(lambda m: f"{m[1]}{m[2]}" if m[1] else f"{m[3]}{{{m[4]}}}", text)
    text = _CDOT.sub("", text)
    # Case distinguishes variables (`A` and `a`), not words (`Even` and `even`).
    return re.sub(r"(?<!\\)\b[A-Za-z]{2,}\b", lambda match: match.group().lower(), text).rstrip(".")


def _bare(text: str) -> str:
    """Without macros, emphasis and brackets around."""
    return _MACRO.sub(r"\1", text).strip("$ *\\()[]")


def _compare_choices(answer: str, gold_letter: str) -> Verdict | None:
    """A gold answer of one letter may be a choice or a variable; a predicted choice decides, anything else is left to algebra."""
    predicted = _CHOICE.match(_bare(answer).lstrip("("))
    if predicted is None:
        return None
    letter = predicted[1].upper()
    status = "correct" if letter == gold_letter else "incorrect"
    return Verdict(status, "exact", f"choice {letter}, gold {gold_letter}")  # type: ignore[arg-type]


def _compare_bases(answer: str, gold: str) -> Verdict | None:
    """`52_8`: the digits and the base must agree; a predicted number may leave out the base that was asked for."""
    gold_match, match = _IN_BASE.fullmatch(canonical(gold)), _IN_BASE.fullmatch(canonical(answer))
    if gold_match is None or match is None or not (gold_match[2] or match[2]):
        return None
    equal = match[1] == gold_match[1] and (match[2] or gold_match[2]) == (gold_match[2] or match[2])
    return Verdict(
        "correct" if equal else "incorrect", "numeric", f"{answer!r:.80} against {gold!r:.80}, in their bases"
    )


def _compare_words(answer: str, gold: str, fuzzy: float | None) -> Verdict | None:
    """A gold answer in words is compared as words: to algebra, `east` and `seat` are the same product of variables."""
    gold_words, words = (_ARTICLE.sub("", _MACRO.sub(r"\1", text).strip("$ *.")) for text in (gold, answer))
    is_marked = "\\text" in gold or "\\mbox" in gold
    if not (_WORDS.fullmatch(gold_words) and _WORDS.fullmatch(words)):
        return None
    if not (is_marked or max(map(len, gold_words.split())) >= 4):
        return None
    if gold_words.lower() == words.lower():
        return Verdict("correct", "exact", f"{answer!r:.80} is the gold answer")
    from rapidfuzz import fuzz

    score = max(fuzz.ratio(words.lower(), gold_words.lower()), fuzz.token_sort_ratio(words.lower(), gold_words.lower()))
    if fuzzy is not None and score >= fuzzy:
        return Verdict("correct", "fuzzy", f"{words!r:.80} resembles {gold_words!r:.80} ({score:.0f} of 100)")
    if score >= RESEMBLES:
        return Verdict("incorrect", "fuzzy", f"{words!r:.80} only resembles {gold_words!r:.80} ({score:.0f} of 100)")
    return Verdict("incorrect", "exact", f"{words!r:.80} is not {gold_words!r:.80}")


def _compare_numbers(answer: str, gold: str, tolerance: float) -> Verdict | None:
    gold_number, number = parse_number(gold), _answer_number(answer)
    if gold_number is not None and number is not None:
        if numbers_equal(number, gold_number, tolerance):
            return Verdict("correct", "numeric", f"{answer!r:.80} equals {gold!r:.80}")
        if not (number.is_ambiguous or gold_number.is_ambiguous):
            return Verdict("incorrect", "numeric", f"{answer!r:.80} is not {gold!r:.80}")
    if gold_number is not None and "\\" not in answer and not any(character.isdigit() for character in answer):
        return Verdict("incorrect", "numeric", f"{answer!r:.80} holds no number")
    return None


def _answer_number(answer: str) -> Number | None:
    """The number in an answer: the answer itself, or the only number in a phrase without LaTeX such as `about 42 apples`."""
    number = parse_number(answer)
    if number is not None or "\\" in answer or ("$" in answer.strip("$") and not is_short(answer)):
        return number
    words = _DIGIT_WORD.findall(answer)
    return parse_number(words[0].strip("()*,;:!?\"'")) if len(words) == 1 else None


def _parts_equal(a: str, b: str, tolerance: float) -> bool | None:
    if canonical(a).removeprefix("+") == canonical(b).removeprefix("+"):
        return True
    number, gold_number = parse_number(a), parse_number(b)
    if number is None or gold_number is None or number.is_ambiguous or gold_number.is_ambiguous:
        return None
    return numbers_equal(number, gold_number, tolerance)
