"""When two equations, or two inequalities that are not solved, say the same.

Raises `UnknownValue` where that cannot be computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from trl_reasoning_distill.verification.answers import Relation
from trl_reasoning_distill.verification.expressions import Call, Expression, Number, Symbol, substitute, variables
from trl_reasoning_distill.verification.values import equal, numeric_value


def equations_equal(gold: tuple[Expression, Expression], answer: tuple[Expression, Expression]) -> bool:
    """Whether two equations say the same: one is a multiple of the other, or is solved for a variable of the other."""
    left, right = Call("-", gold), Call("-", answer)
    if variables(left) != variables(right):
        return False
    if _is_multiple(left, right) is not None:
        return True
    return _is_solved(gold, left, answer, right) or _is_solved(answer, right, gold, left)


def _is_multiple(left: Expression, right: Expression) -> bool | None:
    """Whether `right` is a positive (True) or negative (False) multiple of `left`; `None` if it is no multiple."""
    point = {
        name: Number(Fraction(7919 + 1093 * index, 5077 + 211 * index))
        for index, name in enumerate(sorted(variables(left) | variables(right)))
    }
    there = [substitute(side, point) for side in (left, right)]  # type: ignore[arg-type]
    values = [numeric_value(side) for side in there]
    if not values[0] or not values[1]:
        return None
    if not equal(Call("*", (left, there[1])), Call("*", (right, there[0]))):
        return None
    ratio = values[0] / values[1]
    return getattr(ratio, "real", ratio) > 0


def _is_solved(
    solved: tuple[Expression, Expression],
    difference: Expression,
    other: tuple[Expression, Expression],
    other_difference: Expression,
) -> bool:
    """Whether `solved` is `y = …`, and `other` is linear in y and holds for it."""
    name, value = solved
    if not isinstance(name, Symbol) or name.name in variables(value):
        return False
    at = [substitute(other_difference, {name.name: Number(Fraction(x))}) for x in (0, 1, 2)]
    slope = Call("-", (at[1], at[0]))
    if not equal(slope, Call("-", (at[2], at[1]))):
        return False
    return equal(substitute(other_difference, {name.name: value}), Number(Fraction(0), is_integer=True))


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def relations_equal(gold: Relation, answer: Relation, same: Callable[[Expression, Expression], bool]) -> bool:
    """Whether two chains of inequalities say the same: side by side, turned round, or one a multiple of the other."""
    left = [side for side in gold.sides if side is not None]
    right = [side for side in answer.sides if side is not None]
    if len(left) < len(gold.sides) or len(right) < len(answer.sides):
        return False
    for sides, relations in ((right, answer.relations), (right[::-1], _turned(answer.relations))):
        if relations == gold.relations and all(map(same, left, sides)):
            return True
    if not len(gold.relations) == len(answer.relations) == 1:
        return False
    differences = Call("-", tuple(left)), Call("-", tuple(right))
    if variables(differences[0]) != variables(differences[1]):
        return False
    multiple = _is_multiple(*differences)
    return multiple is not None and gold.relations == (answer.relations if multiple else _turned(answer.relations))


def _turned(relations: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_FLIPPED[relation] for relation in reversed(relations))
