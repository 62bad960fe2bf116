r"""The types of answers: what an answer is, once it has been read whole.

Each is a small frozen record; what is mathematics in it is an `Expression`. `comparison.py` has one rule for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_reasoning_distill.verification.expressions import Expression
from trl_reasoning_distill.verification.units import Unit


@dataclass(frozen=True, slots=True)
class Plain:
    """A number, a matrix or an expression: `42`, `\\frac{\\pi}{6}`, `x^2+1`."""

    value: Expression


@dataclass(frozen=True, slots=True)
class Percentage:
    """`15\\%`: the value is 15."""

    value: Expression


@dataclass(frozen=True, slots=True)
class Quantity:
    """`60 km/h`, `3 h 20 min`, `\\$5`, `90^\\circ`, `5 boys`."""

    value: Expression
    unit: Unit | None
    noun: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    """`2:3:4`, `11 to 21`."""

    terms: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A tuple, point, vector or interval: `(3, 4]`; which of them, the brackets and the other side tell."""

    brackets: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Several:
    """A set in braces, or several values in a row: `\\{1, 2\\}`, `3, 5 and 7`, `1 \\pm \\sqrt2`."""

    parts: tuple[Answer, ...]
    is_set: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """Values with names: `x = 2, y = 1`, `a = 4, -8`; a name may stand several times."""

    parts: tuple[tuple[str, Answer], ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """One value with its name, `x = 5`, `f(x) = x^2`, `m + n = 17`; the sides are kept for where it is an equation."""

    name: str
    value: Answer
    sides: tuple[Expression, Expression]


@dataclass(frozen=True, slots=True)
class Equation:
    """`2x + 4y = 3`."""

    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of inequalities, `0 < x \\le 12`; `at least 5` has no left side."""

    sides: tuple[Expression | None, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers made of others: `(0,9) \\cup (9,36)`, `x \\in [-2, 7]`, `x < 1 or x > 3`."""

    operation: str
    parts: tuple[Answer, ...]
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Congruence:
    """`n \\equiv 3 \\pmod 4`."""

    subject: Expression
    residue: Expression
    modulus: Expression


@dataclass(frozen=True, slots=True)
class Family:
    """Values with a parameter: `3k, k \\in \\mathbb{Z}`."""

    values: tuple[Answer, ...]
    conditions: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class BaseNumeral:
    """`204_5`: digits and base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Choice:
    """`(C)`, `B. 12 apples`, `A and C`: letters, and the text of the option."""

    letters: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """A date, a time of the day, or both; what is not given is `None`."""

    year: int | None = None
    month: int | None = None
    day: int | None = None
    minutes: int | None = None
    half: str | None = None
    seconds: int = 0


@dataclass(frozen=True, slots=True)
class Statement:
    """`yes`, `no`, `nothing` (no solution, the empty set), `undefined`, `infinite` (infinitely many)."""

    kind: str


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    words: tuple[str, ...]


Answer = (
    Plain | Percentage | Quantity | Ratio | Bracketed | Several | Named | Assignment | Equation | Relation | Region | Congruence | Family | BaseNumeral | Choice | Moment | Statement | Text
)  # fmt: skip
