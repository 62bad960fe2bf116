"""Why is this answer wrong? One kind of error per answer, from its text alone.

The kinds are tried in this order, and the first that holds is taken:

=================  ======================================================================================================
`correct`          The verdict is correct.
`timed out`        The verifier ran out of time.
`undecided`        There is no verdict for another reason (crash, unreadable gold).
`truncated`        The token limit cut the text.
`no answer`        No final answer was found.
`format`           The tags around the reasoning are broken, or the last calculation has the right result but another answer
                   was given.
`arithmetic slip`  A calculation in the text, such as `12 + 7 = 18`, is false.
`wrong plan`       None of these: what was calculated is right (or nothing was), but it is not what was asked.
=================  ======================================================================================================

Calculations are read by a linear scan and checked with exact fractions. What the scan cannot read for certain (variables,
brackets, powers, percentages, mixed units) it does not judge, so that `arithmetic slip` is never a guess: the price is that
some slips count as `wrong plan`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from trl_reasoning_distill.data.formatting import PRESETS
from trl_reasoning_distill.data.schema import Prediction

ERROR_KINDS = ("correct", "timed out", "undecided", "truncated", "no answer", "format", "arithmetic slip", "wrong plan")

_MAX_DIGITS = 30  # longer numbers are not arithmetic, and exact fractions of them cost time
_MAX_OPERANDS = 20
_FLOAT_NOISE = Fraction(1, 10**12)
_OPERATORS = {"+": "+", "-": "-", "−": "-", "–": "-", "*": "*", "×": "*", "·": "*", "x": "*", "/": "/", "÷": "/"}
_LATEX_OPERATORS = {"times": "*", "cdot": "*", "div": "/"}
_OPEN_TAG, _CLOSE_TAG = PRESETS["think"].open_tag, PRESETS["think"].close_tag

# No part of this pattern can match the same text in two ways, so it takes time linear in the text.
_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<word>\\?[^\W\d_]+)"
    r"|(?P<mark><<|>>|</?[a-z]+>|\*\*)"
    r"|(?P<newline>\n)"
    r"|(?P<symbol>\S)"
)


@dataclasses.dataclass(frozen=True)
class Equation:
    """A calculation found in a text.

    Attributes:
        text: As it was read, such as `"48 / 2 = 24"`.
        value: The exact value of its left side.
        result: Its value as the text has it.
        holds: Whether they agree; a decimal result may be rounded or cut at its last digit.
    """

    text: str
    value: Fraction
    result: Fraction
    holds: bool


class _Token(NamedTuple):
    kind: str  # number, operator, equals, unit, break (an expression may start or end here), other (it may not)
    text: str


@dataclasses.dataclass(frozen=True)
class _Side:
    """One side of an equals sign: numbers, the operators between them, and the units written behind them."""

    numbers: list[str]
    operators: list[str]
    units: list[str]

    @property
    def value(self) -> Fraction | None:
        return _evaluate([Fraction(number) for number in self.numbers], self.operators)


def find_equations(text: str) -> Iterator[Equation]:
    """Yield the calculations `a op b … = c` of a text, in order; time linear in its length.

    Reads + − × ÷ in their usual spellings (also `*`, `/`, `x` between numbers, `\\times`, `\\div`), thousands separators,
    decimals, currency signs, one unit that all numbers share, chains such as `2 + 3 = 5 + 4 = 9`, and GSM8K's `<<2+3=5>>`.
    """
    tokens = list(_tokenize(text)) if "=" in text else []
    for index, token in enumerate(tokens):
        if token.kind != "equals":
            continue
        left, right = _read_left(tokens, index), _read_right(tokens, index)
        if left is None or right is None or not left.operators:
            continue
        equation = _check(left, right)
        if equation is not None:
            yield equation


def classify_error(prediction: Prediction) -> str:
    """The kind of error of an answer, one of `ERROR_KINDS`."""
    if prediction.timed_out:
        return "timed out"
    if prediction.status in ("correct", "undecided"):
        return prediction.status
    if prediction.finish_reason == "length":
        return "truncated"
    if not prediction.extracted_answer:
        return "no answer"
    if not _tags_are_paired(prediction.completion):
        return "format"
    equations = list(find_equations(prediction.completion))
    if equations and equations[-1].holds and equations[-1].result == _read_number(prediction.gold_answer):
        return "format"
    return "wrong plan" if all(equation.holds for equation in equations) else "arithmetic slip"


def _tags_are_paired(text: str) -> bool:
    """Whether think tags, if there are any, open once and close once, in this order.

    Some chat templates open the tag in the prompt, so that a lone closing tag is whole too.
    """
    opened, closed = text.count(_OPEN_TAG), text.count(_CLOSE_TAG)
    if opened == 0:
        return closed <= 1
    return opened == closed == 1 and text.index(_OPEN_TAG) < text.index(_CLOSE_TAG)


def _read_number(text: str | None) -> Fraction | None:
    match = re.fullmatch(r"\s*\$?(-?[\d,]{1,40}(?:\.\d{1,30})?)\s*", str(text))
    digits = match.group(1).replace(",", "") if match else ""
    return Fraction(digits) if any(map(str.isdigit, digits)) else None


def _tokenize(text: str) -> Iterator[_Token]:
    after_number = False
    for match in _TOKEN.finditer(text):
        kind, token = str(match.lastgroup), match.group()
        is_power = token == "**" and after_number and text[match.end() : match.end() + 1].isdigit()  # else bold type
        after_number = kind == "number"
        if kind == "number":
            yield _Token("number" if len(token) <= _MAX_DIGITS else "other", token.replace(",", ""))
        elif kind == "word":
            yield _classify_word(token)
        elif kind in ("newline", "mark"):
            yield _Token("other" if is_power else "break", token)
        elif token == "=":
            yield _Token("equals", token)
        elif token in _OPERATORS:
            yield _Token("operator", _OPERATORS[token])
        elif token not in "$€£":  # a currency sign changes nothing
            yield _Token("break" if token in ".,:;!?([\\]\"'`~" else "other", token)


def _classify_word(word: str) -> _Token:
    if word in _OPERATORS:  # the x of 3 x 4
        return _Token("operator", _OPERATORS[word])
    if word.startswith("\\"):
        operator = _LATEX_OPERATORS.get(word[1:])
        return _Token("operator", operator) if operator else _Token("other", word)
    # A single letter may be a variable; a longer word may be the unit of the number before it.
    return _Token("unit" if len(word) > 1 else "other", word)


def _read_left(tokens: Sequence[_Token], equals: int) -> _Side | None:
    """Read the expression that ends before `tokens[equals]`, from right to left."""
    side = _Side([], [], [])
    position = equals - 1
    while len(side.numbers) < _MAX_OPERANDS:
        if position >= 1 and tokens[position].kind == "unit" and tokens[position - 1].kind == "number":
            side.units.append(tokens[position].text)
            position -= 1
        if position < 0 or tokens[position].kind != "number":
            return None
        side.numbers.append(tokens[position].text)
        position -= 1
        if position < 0 or tokens[position].kind in ("break", "equals", "unit"):
            return _Side(side.numbers[::-1], side.operators[::-1], side.units)
        if tokens[position].kind != "operator":
            return None
        side.operators.append(tokens[position].text)
        position -= 1
    return None


def _read_right(tokens: Sequence[_Token], equals: int) -> _Side | None:
    """Read the expression that follows `tokens[equals]`, from left to right."""
    side = _Side([], [], [])
    position = equals + 1
    sign = ""
    if position < len(tokens) and tokens[position] == _Token("operator", "-"):
        sign, position = "-", position + 1
    while len(side.numbers) < _MAX_OPERANDS:
        if position >= len(tokens) or tokens[position].kind != "number":
            return None
        side.numbers.append(sign + tokens[position].text)
        sign = ""
        position += 1
        if position < len(tokens) and tokens[position].kind == "unit":
            side.units.append(tokens[position].text)
            position += 1
        if position >= len(tokens) or tokens[position].kind not in ("operator", "other", "number"):
            return side
        if tokens[position].kind != "operator":
            return side if tokens[position].text in ")}" else None
        side.operators.append(tokens[position].text)
        position += 1
    return None


def _check(left: _Side, right: _Side) -> Equation | None:
    """Compare the sides; `None` where that would be a guess."""
    # A unit on the left must be the unit of the result as well: 2 hours + 30 minutes = 150 minutes is no slip.
    if left.units and {*left.units} != {*right.units[:1]}:
        return None
    value, first, whole = left.value, Fraction(right.numbers[0]), right.value
    if value is None:
        return None
    # In `2 + 3 = 5 + 4 = 9` the first number is meant, in `2 * 6 = 3 * 4` the whole side.
    holds = _agree(value, first, right.numbers[0]) or value == whole
    text = " ".join(_interleave(left.numbers, left.operators))
    return Equation(f"{text} = {right.numbers[0]}", value, first, holds)


def _agree(value: Fraction, result: Fraction, written: str) -> bool:
    """Exactly; but for decimals up to their last digit, or up to the noise of a calculator's floating point."""
    decimals = len(written.partition(".")[2])
    tolerance = max(Fraction(1, 10**decimals), abs(value) * _FLOAT_NOISE)
    return abs(value - result) < tolerance if decimals else value == result


def _evaluate(numbers: Sequence[Fraction], operators: Sequence[str]) -> Fraction | None:
    """× and ÷ before + and −, each from the left; `None` for a division by zero."""
    terms = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            terms[-1] *= number
        elif operator == "/":
            if number == 0:
                return None
            terms[-1] /= number
        else:
            terms.append(number if operator == "+" else -number)
    return sum(terms, Fraction(0))


def _interleave(numbers: Sequence[str], operators: Sequence[str]) -> Iterator[str]:
    yield numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        yield operator
        yield number
