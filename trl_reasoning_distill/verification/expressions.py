r"""Mathematical expressions: what they are made of, and their tokens.

An expression is a `Number`, a `Symbol`, or a `Call` of a name on expressions; brackets, sets and matrices are calls, too:
`(1, 2]` is `Call("(]", …)`. Written this way, each is hashable, and the functions that walk them stay short.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_reasoning_distill.verification.units import Unit


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value and how it was written.

    Attributes:
        value: What it is worth.
        is_integer: Written without decimals, fraction or exponent.
        is_decimal: Written with decimals, and so perhaps rounded.
    """

    value: Fraction
    is_integer: bool = False
    is_decimal: bool = False


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, a constant (`pi`, `e`, `i`, `oo`) or a named set (`R`, `Z`)."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A function, an operator or brackets, with what they hold."""

    name: str
    args: tuple[Expression, ...] = ()


@dataclass(frozen=True, slots=True)
class Measure:
    """An amount of something: `5 km`, `5 boys`.

    Attributes:
        value: How many.
        unit: Of what; `None` if that is no unit of measure.
        noun: The words behind it, in lower case.
    """

    value: Expression
    unit: Unit | None = None
    noun: str = ""


Expression = Number | Symbol | Call | Measure

CONSTANTS = frozenset({"pi", "e", "i", "oo"})
OPENING = {
    "(": ")",
    "[": "]",
    "\\{": "\\}",
    "{": "}",
    "\\langle": "\\rangle",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
}
CLOSING = frozenset(OPENING.values())
RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "<=": "<=", ">=": ">=", "=<": "<=", "=>": ">=", "\\ne": "!=", "!=": "!=", "<>": "!=", "/=": "!=",
    "\\approx": "~", "\\in": "in", "\\notin": "notin", "\\equiv": "mod",
}  # fmt: skip

FIGURE = (
    r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?![\d.])|\d{1,3}(?: \d{3})+(?![\d])(?:[.,]\d+(?!\d*[.,]\d))?|\d{1,3}(?:'\d{3})+(?!\d)(?:[.,]\d+)?|\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d*)?"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])(?:\.\d*)?|\d+,\d+(?![\d,])|\d+(?:\.(?!\.)\d*)?|\.\d+"
)
"""A numeral as the world writes it; alternatives from the least ambiguous to the plain one."""
_PLAIN_FIGURE = r"\d{1,3}(?: \d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.(?!\.)\d*)?|\.\d+"
_REST = (
    r"(?P<command>\\[A-Za-z]+|\\[{}|\\&,;%])|(?P<quoted>\"[^\"]*\"?)|(?P<run>[^\W\d_]+)"
    r"|(?P<op><=|>=|=<|=>|==|!=|<>|/=|\.\.\.|\*\*|''|[-+*/^_=<>!%:,;&|'.$€£¥₹@#?~`])|(?P<bracket>[][(){}])|(?P<other>\S)"
)
_EXPONENT = r"(?:[eE][-+]?\d{1,4}(?![A-Za-z\d]))?"
_TOKENS = re.compile(rf"(?P<space> +)|(?P<figure>(?:{FIGURE}){_EXPONENT})|{_REST}")
_LIST_TOKENS = re.compile(rf"(?P<space> +)|(?P<figure>(?:{_PLAIN_FIGURE}){_EXPONENT})|{_REST}")


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer.

    Attributes:
        kind: `figure`, `run` (of letters), `command`, `op`, `bracket` or `other`.
        text: As written.
        is_quoted: Stood in `\\text{…}`: words, never variables.
        is_spaced: White space stands before it.
        position: Where it begins.
    """

    kind: str
    text: str
    is_quoted: bool
    is_spaced: bool
    position: int


def tokenize(text: str, commas_part: bool = False, *, quoted: bool = False, offset: int = 0) -> list[Token]:
    """Cut a normalized answer into tokens; every character but white space is in one.

    Args:
        text: What `normalize` returned.
        commas_part: Whether a comma between digits parts two numbers; else it is read as the number's own where it can be.
        quoted: The text stood in quotes.
        offset: Of the text in the answer.
    """
    tokens: list[Token] = []
    spaced = False
    for match in (_LIST_TOKENS if commas_part else _TOKENS).finditer(text):
        kind = match.lastgroup or "other"
        if kind == "space":
            spaced = True
            continue
        if kind == "quoted":
            inside = tokenize(match[0].strip('"'), commas_part, quoted=True, offset=offset + match.start() + 1)
            tokens += inside
        else:
            tokens.append(Token(kind, match[0], quoted, spaced, offset + match.start()))
        spaced = kind == "quoted"
    return tokens


def read_figure(text: str) -> Number | None:
    """The value of a numeral in figures: `1,234.5`, `1.234,56`, `12,34,567`, `1 234,56`, `6.02e23`.

    A single comma before three digits groups thousands (`1,234`), unless a zero or more than three digits stand before it.
    """
    body, _, exponent = text.replace("E", "e").partition("e")
    power = int(exponent) if exponent else 0
    if abs(power) > 4000 or len(body) > 4000:
        return None
    digits = body.replace(" ", "").replace("'", "")
    commas, points = digits.count(","), digits.count(".")
    if commas and points:
        decimal = max(digits.rfind(","), digits.rfind("."))
        digits = re.sub(r"[.,]", "", digits[:decimal]) + "." + digits[decimal + 1 :]
    elif commas:
        whole, _, rest = digits.partition(",")
        grouped = commas > 1 or (len(rest) == 3 and whole != "0" and len(whole) <= 3 and " " not in body)
        digits = digits.replace(",", "" if grouped else ".")
    elif points > 1:
        digits = digits.replace(".", "")
    whole, _, decimals = digits.partition(".")
    value = Fraction(int(whole + decimals or "0")) * Fraction(10) ** (power - len(decimals))
    return Number(value, is_integer="." not in digits and not exponent, is_decimal=bool(decimals))


def walk(expression: Expression) -> Iterator[Expression]:
    """An expression and all that it holds."""
    pending = [expression]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, Call):
            pending.extend(node.args)
        elif isinstance(node, Measure):
            pending.append(node.value)


def variables(expression: Expression) -> frozenset[str]:
    """The names of the symbols that are not constants."""
    return frozenset(node.name for node in walk(expression) if isinstance(node, Symbol) and node.name not in CONSTANTS)


def substitute(expression: Expression, names: dict[str, Expression]) -> Expression:
    """The expression with some of its symbols replaced."""
    if isinstance(expression, Symbol):
        return names.get(expression.name, expression)
    if isinstance(expression, Call):
        return Call(expression.name, tuple(substitute(arg, names) for arg in expression.args))
    return expression


def is_written_exactly(expression: Expression) -> bool:
    """Whether no number in it has decimals, which may be rounded."""
    return not any(isinstance(node, Number) and node.is_decimal for node in walk(expression))
