r"""Sets of real numbers as intervals: `x < 1 or x > 3`, `(-\infty, 1) \cup (3, \infty)`, `\mathbb{R} \setminus [1, 3]`.

An inequality in one unknown is solved where it is linear or quadratic in it, or in its absolute value; where it is not, it has no region here, and
is compared as a relation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from trl_reasoning_distill.verification.answers import (
    Answer,
    Bracketed,
    Percentage,
    Plain,
    Quantity,
    Region,
    Relation,
    Several,
    Statement,
)
from trl_reasoning_distill.verification.classification import name_of
from trl_reasoning_distill.verification.expressions import Call, Expression, Symbol, variables, walk
from trl_reasoning_distill.verification.values import DIGITS, UnknownValue, _context, numeric_value


@dataclass(frozen=True)
class Interval:
    """Ends as mpmath numbers, and whether they belong to it."""

    low: Any
    high: Any
    has_low: bool
    has_high: bool


Intervals = tuple[Interval, ...]


def subjects_of(answer: Answer) -> set[str]:
    """The unknowns that a relation or region is about."""
    match answer:
        case Region(_, parts, subject):
            return {name for part in parts for name in subjects_of(part)} | ({subject} - {""})
        case Relation(sides, _):
            return {name for side in sides if side is not None for name in variables(side)}
    return set()


def region_of(answer: Answer) -> Intervals | None:
    """The real numbers that an answer describes, as intervals from left to right; `None` if it describes none, or none that is found here."""
    if len(subjects_of(answer)) > 1:
        return None
    try:
        found = _region(answer)
    except UnknownValue:
        return None
    return None if found is None else _merged(found)


def _region(answer: Answer) -> list[Interval] | None:
    mp = _context(DIGITS[0])
    match answer:
        case Bracketed(brackets, (low, high)) if len(brackets) == 2 and brackets != "<>":
            ends = [_end(low), _end(high)]
            if ends[0] > ends[1]:
                raise UnknownValue("an interval that ends before it begins")
            return [Interval(ends[0], ends[1], brackets[0] == "[", brackets[1] == "]")]
        case Several(parts, _):
            points = [_end(part) for part in parts]
            return [Interval(point, point, True, True) for point in points]
        case Plain():
            point = _end(answer)
            return [Interval(point, point, True, True)]
        case Statement("reals") | Region("{R}", ()):
            return [Interval(-mp.inf, mp.inf, False, False)]
        case Statement("nothing"):
            return []
        case Region("in", (inner,)):
            return _region(inner)
        case Region("notin", (inner,)):
            return _complement(_region(inner))
        case Region("minus", (whole, without)):
            return _both(_region(whole), _complement(_region(without)))
        case Region("cup", parts):
            regions = [_region(part) for part in parts]
            return None if None in regions else [interval for region in regions if region for interval in region]
        case Region("cap" | "and", parts):
            return _together(answer.operation, [_region(part) for part in parts])
        case Relation():
            return _solved(answer)
    return None


def _together(operation: str, regions: Sequence[list[Interval] | None]) -> list[Interval] | None:
    if None in regions or not regions:
        return None
    common = functools.reduce(_both, regions)
    if operation == "and" and not common:  # `x < 1, x > 3` can only mean either
        return [interval for region in regions if region for interval in region]
    return common


def _end(answer: Answer) -> Any:
    if not isinstance(answer, Plain | Quantity | Percentage):
        raise UnknownValue("an end that is no number")
    return _real(numeric_value(answer.value))


def _real(value: Any) -> Any:
    mp = _context(DIGITS[0])
    if isinstance(value, Fraction):
        return mp.mpf(value.numerator) / value.denominator
    if isinstance(value, tuple) or value.imag or mp.isnan(value):
        raise UnknownValue("no real number")
    return value.real


def _complement(region: list[Interval] | None) -> list[Interval] | None:
    if region is None:
        return None
    mp = _context(DIGITS[0])
    found, low, has_low = [], -mp.inf, False
    for interval in _merged(region):
        if interval.low > low or (interval.low == low and has_low and not interval.has_low):
            found.append(Interval(low, interval.low, has_low, not interval.has_low))
        low, has_low = interval.high, not interval.has_high
    if low < mp.inf:
        found.append(Interval(low, mp.inf, has_low, False))
    return found


def _both(left: list[Interval] | None, right: list[Interval] | None) -> list[Interval] | None:
    if left is None or right is None:
        return None
    found = []
    for a in left:
        for b in right:
            low, high = max(a.low, b.low), min(a.high, b.high)
            has_low = (a.has_low or a.low < low) and (b.has_low or b.low < low)
            has_high = (a.has_high or a.high > high) and (b.has_high or b.high > high)
            if low < high or (low == high and has_low and has_high):
                found.append(Interval(low, high, has_low, has_high))
    return found


def _merged(region: Sequence[Interval]) -> Intervals:
    found: list[Interval] = []
    for interval in sorted(region, key=lambda i: (i.low, not i.has_low)):
        last = found[-1] if found else None
        if last is not None and (
            interval.low < last.high or (interval.low == last.high and (interval.has_low or last.has_high))
        ):
            high = max(last.high, interval.high)
            has_high = any(i.has_high for i in (last, interval) if i.high == high)
            found[-1] = Interval(last.low, high, last.has_low, has_high)
        else:
            found.append(interval)
    return tuple(found)


def _solved(relation: Relation) -> list[Interval] | None:
    """The solutions of a chain of inequalities in one unknown."""
    unknowns = {_unknown(side) for side in relation.sides if side is None or variables(side)}
    if len(unknowns) != 1:
        return None
    regions = [
        _solve_one(left, relation_, right)
        for left, relation_, right in zip(relation.sides[:-1], relation.relations, relation.sides[1:], strict=True)
    ]
    return _together("cap", regions)


def _unknown(side: Expression | None) -> str:
    """The variable of a side, or the side itself where it is a name such as `f(x)`."""
    if side is None:
        return ""
    if isinstance(side, Call) and side.name.startswith("f:"):
        return name_of(side) or repr(side)
    names = variables(side)
    return next(iter(names)) if len(names) == 1 else repr(side)


def _solve_one(left: Expression | None, relation: str, right: Expression | None) -> list[Interval] | None:
    mp = _context(DIGITS[0])
    sides = [
        Symbol("·") if side is None or (isinstance(side, Call) and side.name.startswith("f:")) else side
        for side in (left, right)
    ]
    names = {name for side in sides for name in variables(side)}
    if len(names) != 1:
        return None
    name = next(iter(names))
    difference = Call("-", tuple(sides))

    def value(x: Any) -> Any:
        return _real(numeric_value(difference, DIGITS[0], {name: mp.mpf(x)}))

    roots = _roots(value, difference)
    if roots is None:
        return None
    edges = [-mp.inf, *roots, mp.inf]
    found = []
    for low, high in itertools.pairwise(edges):
        inside = 0 if not roots else high - 1 if low == -mp.inf else low + 1 if high == mp.inf else (low + high) / 2
        if _holds(value(inside), relation):
            found.append(Interval(low, high, False, False))
    if "=" in relation and relation != "!=":
        found += [Interval(root, root, True, True) for root in roots]
    return list(_merged(found))


def _holds(value: Any, relation: str) -> bool:
    return {"<": value < 0, "<=": value < 0, ">": value > 0, ">=": value > 0, "!=": value != 0}[relation]


def _roots(value: Any, difference: Expression) -> list[Any] | None:
    """The zeros of a function that is linear or quadratic, or that in |x|; `None` if it is neither."""
    mp = _context(DIGITS[0])
    has_absolute = any(isinstance(node, Call) and node.name == "abs" for node in walk(difference))
    if has_absolute:
        positive = _polynomial_roots([value(x) for x in (1, 2, 3, 5, 8)], (1, 2, 3, 5, 8))
        if positive is None or any(abs(value(-x) - value(x)) > mp.mpf(10) ** -25 for x in (1, 2, 5)):
            return None
        return sorted({sign * root for root in positive if root >= 0 for sign in (1, -1)})
    points = (-2, -1, 1, 3, 7)
    return _polynomial_roots([value(x) for x in points], points)


def _polynomial_roots(values: Sequence[Any], points: Sequence[int]) -> list[Any] | None:
    """Of the polynomial of degree ≤ 2 through the values; `None` if there is none."""
    mp = _context(DIGITS[0])
    x0, x1, x2 = map(mp.mpf, points[:3])
    y0, y1, y2 = values[:3]
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    a = (second - first) / (x2 - x0)
    b = first - a * (x0 + x1)
    c = y0 - a * x0 * x0 - b * x0
    tiny = mp.mpf(10) ** -28 * (1 + max(map(abs, values)))
    if any(abs(a * x * x + b * x + c - y) > tiny for x, y in zip(points[3:], values[3:], strict=True)):
        return None
    if abs(a) < tiny:
        return None if abs(b) < tiny else [-c / b]
    discriminant = b * b - 4 * a * c
    if abs(discriminant) < tiny:
        return [-b / (2 * a)]
    if discriminant < 0:
        return []
    root = mp.sqrt(discriminant)
    return sorted([(-b - root) / (2 * a), (-b + root) / (2 * a)])


def regions_equal(left: Intervals, right: Intervals, tolerance: float) -> bool:
    """Whether two regions have the same intervals, with ends equal to 25 digits."""
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if (a.has_low, a.has_high) != (b.has_low, b.has_high):
            return False
        for x, y in ((a.low, b.low), (a.high, b.high)):
            if x != y and (_context(DIGITS[0]).isinf(abs(x) + abs(y)) or abs(x - y) > 1e-25 * max(abs(x), abs(y))):
                return False
    return True
