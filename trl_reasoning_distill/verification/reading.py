r"""Reads an answer whole: `read("3 h 20 min")`.

Statements (`no solution`), choices, dates and texts are recognized by their words; everything else by the grammar in `parsing.py`. A writing
that can be two things (`3,4`; `C`; `(2, 5)`) has several readings. What nothing reads to its end has none, and `left_over` is what stood in the way.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from trl_reasoning_distill.verification.answers import (
    Answer,
    BaseNumeral,
    Choice,
    Moment,
    Percentage,
    Plain,
    Quantity,
    Ratio,
    Relation,
    Several,
    Statement,
    Text,
)
from trl_reasoning_distill.verification.classification import SENSELESS, NotAnAnswer, classify
from trl_reasoning_distill.verification.expressions import Expression, Number, tokenize
from trl_reasoning_distill.verification.parsing import LeftOver, Parser
from trl_reasoning_distill.verification.typography import normalize
from trl_reasoning_distill.verification.vocabulary import (
    BOUNDS,
    BOUNDS_AFTER,
    LEAD_IN,
    MONTHS,
    NEGATED,
    STATEMENTS,
    TRAIL,
    UNSURE,
    words_to_figures,
)

MAX_LENGTH = 2000
_MAX_TEXT_WORDS = 60

_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_PLAIN_DECIMAL = re.compile(r"[-+]?[0-9]{1,300}\.[0-9]{1,300}")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer|选项?|選|选择|选择题)[ :]*)?[(\[]?([A-Ja-j])[)\].:,]?(?: ?(?:选?项|選項))?",
    re.IGNORECASE,
)
_CHOICE_TEXT = re.compile(
    r"(?:(?:option|choice|answer|选项?|選|选择)[ :]*)?(?:\(([A-Ja-j])\)|\[([A-J])\]|([A-Ja-j])[).:]|([A-J])(?= because| since| as |,| -)|\(?([A-J])\)? -)[ ,.:]*(.+)",
    re.IGNORECASE,
)
_CHOICES = re.compile(r"[(\[]?[A-J][)\]]?(?:(?: ?(?:,|and|&|和|、|;|or) ?| )[(\[]?[A-J][)\]]?)+|[A-J]{2,6}")
_OPTION_MARK = re.compile(r"(?:^|[ ,;])\(?[A-Ja-j][).:](?= |$|[^A-Za-z])")
_REASON = re.compile(r"^(?:because|since|as|for|,|-)\b")

_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_TIME = r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?(?::(?P<second>[0-5]\d))? ?(?P<half>[ap]\.?m\.?)?"
_DATES = [
    re.compile(rf"(?P<month>{_MONTH})\.? (?P<day>\d{{1,2}})(?:st|nd|rd|th)?(?:,? (?P<year>\d{{4}}))?", re.IGNORECASE),
    re.compile(
        rf"(?:the )?(?P<day>\d{{1,2}})(?:st|nd|rd|th|\.|er)?(?: of| de)? (?P<month>{_MONTH})\.?(?:,?(?: de)? (?P<year>\d{{4}})(?: года| г\.?)?)?",
        re.IGNORECASE,
    ),
    re.compile(rf"(?P<month>{_MONTH})\.?,? (?P<year>\d{{4}})", re.IGNORECASE),
    re.compile(r"(?P<year>\d{4})([-/.])(?P<month>\d{1,2})\2(?P<day>\d{1,2})"),
    re.compile(r"(?P<year>\d{4}) ?[年년] ?(?P<month>\d{1,2}) ?[月월] ?(?:(?P<day>\d{1,2}) ?[日号일])?"),
    re.compile(r"(?P<month>\d{1,2}) ?[月월] ?(?P<day>\d{1,2}) ?[日号일]"),
    re.compile(r"(?P<day>\d{1,2})([/.])(?P<month>\d{1,2})\2(?P<year>\d{4})"),
    re.compile(r"(?P<month>\d{1,2})/(?P<day>\d{1,2})/(?P<year>\d{4})"),
]
_WEEKDAY = re.compile(r"(?:mon|tues|wednes|thurs|fri|satur|sun)day,? ", re.IGNORECASE)
_CLOCK = re.compile(_TIME, re.IGNORECASE)
_TO_RATIO = re.compile(r"(\d+(?:\.\d+)?)((?: to \d+(?:\.\d+)?)+)")
_IN_BASE = re.compile(
    r"\(?(\d[\dA-Z]*|[A-F][\dA-F]+)\)?(?: ?_ ?\{? ?\"?(\d{1,2})\"? ?\}?|,? ?\(?(?:in )?base[- ](\d{1,2})\)?)"
)
_NOTE = re.compile(r"(?<=[\d%]) \((?!mod|not|or|and|base|in base)(?=[^()]*[a-z]{4})[^()\\=<>]{2,60}\)$")
"""A remark behind a number: `42 (6 times 7)`."""
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_CALCULUS = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|partial)(?![A-Za-z])|\\frac ?\{d[^{}]{0,20}\}\{d[a-z]")


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer is.

    Attributes:
        answers: Its readings, the likeliest first; empty if it could not be read whole.
        left_over: What could not be read; or, where all was read but makes no answer (`5 = 6`), why.
        text: The answer in one writing.
        is_senseless: All of it was read, and it makes no answer.
    """

    answers: tuple[Answer, ...]
    left_over: str = ""
    text: str = ""
    is_senseless: bool = False

    @property
    def needs_calculus(self) -> bool:
        """Whether a sum, an integral or a limit stands in it, which the grammar leaves to algebra."""
        return not self.answers and _CALCULUS.search(self.text) is not None


@functools.lru_cache(maxsize=4096)  # the samples of one problem share their gold answer, and often their answers
def read(text: str) -> Reading:
    """Read an answer; see the module. Never raises, whatever the text."""
    if len(text) > MAX_LENGTH:
        return Reading((), f"{len(text)} characters")
    quick = _quick(text.strip())
    if quick is not None:
        return Reading((quick,), text=text.strip())
    normal = normalize(text)
    try:
        return _read(normal)
    except RecursionError:
        return Reading((), "too deeply nested", normal)


def _quick(text: str) -> Answer | None:
    """An integer or a decimal, without further ado."""
    if _INTEGER.fullmatch(text):
        return Plain(Number(Fraction(int(text)), is_integer=True))
    if _PLAIN_DECIMAL.fullmatch(text):
        return Plain(Number(Fraction(text), is_decimal=True))
    return None


def _read(text: str) -> Reading:
    text = _NOTE.sub("", _trim(text))
    found: list[Answer] = []
    statement = STATEMENTS.get(text.lower().strip(' ".!')) or _yes_or_no(text)
    if statement is not None:
        found.append(Statement(statement))
    found += _choices(text)
    found += _moments(text)
    in_base = _IN_BASE.fullmatch(text)
    if in_base is not None and 2 <= int(in_base[2] or in_base[3]) <= 36:
        return Reading((BaseNumeral(in_base[1], int(in_base[2] or in_base[3])),), text=text)
    if _CALCULUS.search(text):
        return Reading((), "a sum, an integral, a limit or a derivative", text)
    mathematics, left_over = _mathematics(text)
    found += mathematics
    if not found:
        inner, left_over = _phrases(text, left_over)
        found += inner
    if not mathematics or _is_bare_word(text):
        words = _words(text)
        if words is not None:
            found.append(words)
            left_over = "" if len(found) == 1 else left_over
    return Reading(
        tuple(dict.fromkeys(found)),
        "" if found else left_over,
        text,
        is_senseless=not found and (left_over in SENSELESS or _commits_to_nothing(text)),
    )


def _commits_to_nothing(text: str) -> bool:
    """Whether an answer denies, doubts, or lists the options."""
    return bool(UNSURE.search(text) or NEGATED.search(text)) or has_options(text)


def _yes_or_no(text: str) -> str | None:
    """`Yes, it is`: the first word tells."""
    first, comma, rest = text.partition(",")
    kind = STATEMENTS.get(first.lower().strip(' ".!'))
    return kind if comma and kind in ("yes", "no") and not any(c.isdigit() or c == "\\" for c in rest) else None


def _trim(text: str) -> str:
    """Without punctuation and quotes around."""
    text = text.strip(" \t*_`")
    while True:
        before = text
        text = text.rstrip(" .。!?*_`") if text.endswith((". ", "。", "*", "_", "`")) else text
        if text.endswith(".") and not text.endswith(("..", " a.m.", " p.m.")):
            text = text[:-1].rstrip()
        text = text.rstrip(",;: ").strip()
        if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1] and not text[1:-1].strip():
            return ""
        if text == before:
            return text


def _mathematics(text: str) -> tuple[list[Answer], str]:
    """The grammar's readings: a comma between digits belongs to a number, or parts two."""
    found: list[Answer] = []
    negation = NEGATED.search(text)
    if negation is not None:
        return [], negation[0]
    figures = words_to_figures(text)
    ratio = _TO_RATIO.fullmatch(figures)
    if ratio is not None:
        return [Ratio(tuple(Number(Fraction(term), is_integer="." not in term) for term in figures.split(" to ")))], ""
    left_over = ""
    for commas_part in (False, True):
        if commas_part and not re.search(r"\d,\d", figures):
            break
        try:
            expression = Parser(tokenize(figures, commas_part)).whole()
            found.append(classify(expression))
        except LeftOver as stop:
            left_over = stop.token.text or "the end"
        except NotAnAnswer as reason:
            left_over = str(reason)
    left_over = "" if found else left_over
    found = _unambiguous(found, figures)
    return found, left_over


def _unambiguous(found: list[Answer], figures: str) -> list[Answer]:
    """`58,500` is a number; `(2,12)` is a pair, as MATH writes it."""
    if (
        len(found) == 2
        and isinstance(found[0], Plain)
        and isinstance(found[1], Several)
        and re.fullmatch(r"-?\d{1,3}(?:,\d{3})+", figures)
        and not re.search(r"(?<!\d)0\d\d", figures)
    ):
        return found[:1]
    if len(found) == 2 and found[0] != found[1] and any(bracket in figures for bracket in "([{"):
        return found[1:]  # `(2,12)`: nobody writes one number in brackets
    return found


def _phrases(text: str, left_over: str) -> tuple[list[Answer], str]:
    """`at least 5`, `not 5`, `5 or more`, `the answer is 5`, `5 (since …)`: what words around a readable answer make of it."""
    if UNSURE.search(text):
        return [], left_over
    for pattern, relation in BOUNDS:
        match = pattern.match(text)
        if match is not None:
            return _bounded(text[match.end() :], relation), left_over
    for pattern, relation in BOUNDS_AFTER:
        match = pattern.search(text)
        if match is not None:
            return _bounded(text[: match.start()], relation), left_over
    between = re.fullmatch(
        r"(?:between|from|zwischen|entre|от|между) (.+?) (?:and|to|und|et|y|e|до|и) (.+)", text, re.IGNORECASE
    )
    if between is not None:
        ends = [_single(words_to_figures(part)) for part in between.groups()]
        if all(end is not None for end in ends):
            return [Relation((ends[0], None, ends[1]), ("<", "<"))], left_over
        return [], left_over
    unquoted = " ".join(text.replace('"', " ").split()) if text.startswith('"') else text
    lead = LEAD_IN.match(unquoted)
    if lead is not None and lead.end() and unquoted[lead.end() :].strip():
        inner = _read(unquoted[lead.end() :])
        if inner.answers and not all(isinstance(answer, Text) for answer in inner.answers):
            return list(inner.answers), ""
        left_over = inner.left_over or left_over
    trail = TRAIL.search(text)
    if trail is not None and trail.start():
        inner = _read(text[: trail.start()])
        if inner.answers and not all(isinstance(answer, Text) for answer in inner.answers):
            return list(inner.answers), ""
    return [], left_over


def _single(text: str) -> Expression | None:
    found, _ = _mathematics(_trim(text))
    return found[0].value if found and isinstance(found[0], Plain | Quantity | Percentage) else None


def _bounded(rest: str, relation: str) -> list[Answer]:
    value = _single(words_to_figures(rest))
    return [] if value is None else [Relation((None, value), (relation,))]


def _choices(text: str) -> list[Answer]:
    """`C`, `(C)`, `C. 12 apples`, `A and C`; several options one after the other are none."""
    bare = text.replace('"', "").strip()
    match = _CHOICE.fullmatch(bare)
    if match is not None:
        return [Choice((match[1].upper(),))]
    if _CHOICES.fullmatch(bare):
        return [Choice(tuple(sorted(set(re.findall(r"[A-J]", bare)))))]
    if has_options(bare):
        return []
    match = _CHOICE_TEXT.fullmatch(bare)
    if match is not None and not re.match(r"\(?[a-j]\)\(", bare):
        letter = next(group for group in match.groups()[:5] if group)
        rest = match[6].strip()
        if re.match(r"(?:or|and|nor|oder|或|,)\b", rest, re.IGNORECASE):
            return []
        return [Choice((letter.upper(),), "" if _REASON.match(rest) else rest)]
    return []


def has_options(text: str) -> bool:
    """Whether several options are listed: `A) 5 B) 6`."""
    return len(_OPTION_MARK.findall(text)) > 1


def _moments(text: str) -> list[Answer]:
    """Dates and times of the day; `05/06/2020` can be two dates."""
    bare = text.replace('"', "").replace("\\cdot ", "").strip()
    if not any(character.isdigit() for character in bare) or len(bare) > 40:
        return (
            [Moment(minutes=720)]
            if bare.lower() == "noon"
            else [Moment(minutes=0)]
            if bare.lower() == "midnight"
            else []
        )
    bare = _WEEKDAY.sub("", bare, count=1)
    found: list[Answer] = []
    for pattern in _DATES:
        match = pattern.fullmatch(bare)
        if match is None:
            continue
        parts = {name: value for name, value in match.groupdict().items() if value}
        month = (
            MONTHS.get(parts["month"].lower()) or int(parts["month"])
            if parts["month"].isdigit() or parts["month"].lower() in MONTHS
            else 0
        )
        year, day = parts.get("year"), parts.get("day")
        if 1 <= month <= 12 and 1 <= int(day or 1) <= 31:
            found.append(Moment(int(year) if year else None, month, int(day) if day else None))
    clock = _CLOCK.fullmatch(bare)
    if clock is not None and (clock["half"] or (clock["minute"] and not clock["second"])) and int(clock["hour"]) < 25:
        half = clock["half"].lower().replace(".", "") if clock["half"] else None
        hour = int(clock["hour"]) % 12 + 12 * (half == "pm") if half else int(clock["hour"])
        found.append(
            Moment(minutes=60 * hour + int(clock["minute"] or 0), half=half, seconds=int(clock["second"] or 0))
        )
    return found


def _is_bare_word(text: str) -> bool:
    return len(text) > 1 and re.fullmatch(r'"?[^\W\d_]{2,}"?', text) is not None


def _words(text: str) -> Text | None:
    """A text without figures, formulas and signs, as its words."""
    bare = text.replace('"', " ")
    if any(character.isdigit() or character in "\\^_=<>{}+*/|$%&#@" for character in bare):
        return None
    words = [word.lower() for word in _WORD.findall(bare)]
    if bare.count("(") != bare.count(")") or bare.count("[") != bare.count("]"):
        return None
    if not words or len(words) > _MAX_TEXT_WORDS:
        return None
    while len(words) > 1 and words[0] in (
        "a",
        "an",
        "the",
        "it",
        "is",
        "le",
        "la",
        "les",
        "der",
        "die",
        "das",
        "el",
        "los",
        "las",
        "o",
        "os",
        "as",
    ):
        words = words[1:]
    return Text(tuple(words))
