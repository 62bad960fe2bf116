r"""From the grammar's expression to the type of answer that it is.

`5`, `x = 5`, `2x = 5`, `x < 5` and `(0, 5)` are all expressions to the grammar; here they become a `Plain`, an `Assignment`, an `Equation`, a
`Relation` and a `Bracketed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from trl_reasoning_distill.verification.answers import (
    Answer,
    Assignment,
    BaseNumeral,
    Bracketed,
    Congruence,
    Equation,
    Family,
    Named,
    Percentage,
    Plain,
    Quantity,
    Ratio,
    Region,
    Relation,
    Several,
    Statement,
)
from trl_reasoning_distill.verification.expressions import (
    CONSTANTS,
    Call,
    Expression,
    Measure,
    Number,
    Symbol,
    substitute,
    variables,
    walk,
)
from trl_reasoning_distill.verification.units import unit_named
from trl_reasoning_distill.verification.values import UnknownValue, equal, exact_value

DUMMY = Symbol("·")
"""Stands for the variable of a function that an answer defines: `f(x) = x^2` and `f(t) = t^2` are one function."""
_MAX_SIGNS = 3


class NotAnAnswer(ValueError):  # noqa: N818 - not a mistake of anybody
    """The expression was read, but it makes no answer: `5 = 6`, a measure inside a sum."""


def classify(expression: Expression) -> Answer:
    """The type of an expression.

    Raises:
        NotAnAnswer: If it makes no sense as one.
    """
    if isinstance(expression, Number | Symbol):
        return Plain(expression)
    if isinstance(expression, Measure):
        return _measure(expression)
    name, args = expression.name, expression.args
    if name in ("list", "or", "mixed"):
        return _list(args, name)
    if name.startswith("chain:"):
        return _chain(args, name.removeprefix("chain:").split())
    rule = _BY_NAME.get(name)
    if rule is not None:
        return rule(args)
    if name.startswith("f:") and len(args) > 1 and name[2:].isupper() and len(name) == 3:
        return Bracketed("()", tuple(map(classify, args)))  # the point P(1, 2)
    if name[0] in "([<" and len(name) == 2:
        return Bracketed(name, tuple(map(classify, args)))
    if name[0] == "{" and len(name) > 2:
        return Region(name, ())
    return _value(expression)


def _value(expression: Expression) -> Answer:
    marked = [node for node in walk(expression) if isinstance(node, Call) and node.name in ("±", "∓")]
    if marked:
        return (
            Several(tuple(_value(e) for e in _both_signs(expression)))
            if len(marked) <= _MAX_SIGNS
            else _refuse("too many signs")
        )
    if isinstance(expression, Call) and expression.name == "neg":
        inner = classify(expression.args[0])
        if isinstance(inner, Percentage | Quantity):
            value = Call("neg", (inner.value,))
            return Percentage(value) if isinstance(inner, Percentage) else Quantity(value, inner.unit, inner.noun)
    for node in walk(expression):
        if isinstance(node, Measure) or (
            isinstance(node, Call) and (node.name in _STRUCTURES or node.name.startswith("chain:"))
        ):
            _refuse("brackets or a unit inside a sum")
    return Plain(expression)


_STRUCTURES = frozenset(
    {
        "list",
        "or",
        "mixed",
        "{}",
        "()",
        "(]",
        "[)",
        "[]",
        "cup",
        "cap",
        "minus",
        "builder",
        "congruent",
        "base",
        "ratio",
    }
)


SENSELESS = frozenset({
    "brackets or a unit inside a sum", "a unit behind what is no number", "too many signs", "several answers", "an element that is no name", "some values have no name", "an element of what is no set", "its sides are not equal",
    "an inequality between what are no numbers", "an equation between what are no numbers", "relations that do not go together", "no base of numerals",
})  # fmt: skip
"""Why an expression that was read whole makes no answer."""


def _refuse(reason: str) -> NoReturn:
    raise NotAnAnswer(reason)


def _both_signs(expression: Expression) -> list[Expression]:
    """With `±` as plus and `∓` as minus, and the other way round."""

    def choose(node: Expression, upper: bool) -> Expression:
        if not isinstance(node, Call):
            return node
        args = tuple(choose(arg, upper) for arg in node.args)
        if node.name in ("±", "∓"):
            is_plus = (node.name == "±") == upper
            if len(args) == 1:
                return args[0] if is_plus else Call("neg", args)
            return Call("+" if is_plus else "-", args)
        return Call(node.name, args)

    return [choose(expression, True), choose(expression, False)]


def _measure(measure: Measure) -> Answer:
    if isinstance(measure.value, Call) and measure.value.name == "%":
        return Percentage(measure.value.args[0])
    value = classify(measure.value)
    if not isinstance(value, Plain):
        _refuse("a unit behind what is no number")
    return Quantity(value.value, measure.unit, measure.noun)


def _list(args: Sequence[Expression], name: str) -> Answer:
    parts = [classify(arg) for arg in args]
    flat: list[Answer] = []
    is_nested = any(isinstance(arg, Call) and arg.name == "list" for arg in args)
    for part in parts:  # `2, 1 \pm \sqrt5` are three values
        flat += part.parts if isinstance(part, Several) and not part.is_set and not is_nested else [part]
    conditions = [arg for arg, part in zip(args, parts, strict=True) if _is_condition(arg, part)]
    relations = [part for part in parts if isinstance(part, Relation)]
    if (
        len(relations) == 1
        and len(conditions) == len(parts) - 1
        and all(Call("{R}", ()) in getattr(c, "args", ()) for c in conditions)
    ):
        return relations[0]  # `x > 2, x \\in \\mathbb{R}`
    if conditions and len(conditions) < len(parts):
        values = tuple(part for arg, part in zip(args, parts, strict=True) if arg not in conditions)
        return Family(values, tuple(conditions))
    if all(isinstance(part, Relation | Region) for part in flat):
        nameless = [isinstance(part, Region) and not part.subject and part.operation != "and" for part in flat]
        if all(nameless):
            return Several(tuple(flat))
        if name == "mixed" or any(nameless):
            _refuse("several answers")
        return Region("cup" if name == "or" else "and", tuple(flat))
    if isinstance(flat[0], Assignment) and all(isinstance(part, Assignment | Plain | Bracketed) for part in flat):
        return _named(flat)
    if (
        len(flat) > 1
        and isinstance(flat[-1], Assignment)
        and all(isinstance(part, Plain) and isinstance(part.value, Symbol) for part in flat[:-1])
    ):
        return _named(
            [
                Assignment(part.value.name, flat[-1].value, flat[-1].sides)
                if isinstance(part, Plain) and isinstance(part.value, Symbol)
                else part
                for part in flat
            ]
        )
    return Several(tuple(flat))


def _is_condition(arg: Expression, part: Answer) -> bool:
    """`k \\in \\mathbb{Z}`: the values that a parameter may have."""
    return (
        isinstance(part, Region)
        and part.operation == "in"
        and isinstance(part.parts[0], Region)
        and not part.parts[0].parts
        and isinstance(arg, Call)
        and isinstance(arg.args[0], Symbol)
    )


def _named(parts: Sequence[Answer]) -> Answer:
    """Each value under its name; one without a name belongs to the name before it."""
    named: list[tuple[str, Answer]] = []
    for part in parts:
        if isinstance(part, Assignment):
            values = part.value.parts if isinstance(part.value, Several) and not part.value.is_set else (part.value,)
            named += [(part.name, value) for value in values]
        else:
            named.append((named[-1][0], part))
    names = {name for name, _ in named}
    if len(names) == 1 and len(named) == 1:
        return parts[0]
    if len(names) < len(named) and any(not isinstance(part, Assignment) for part in parts) and len(names) > 1:
        _refuse("some values have no name")
    return Named(tuple(named))


def _chain(sides: Sequence[Expression], relations: Sequence[str]) -> Answer:
    if set(relations) <= {"=", "~"}:
        return _equalities(list(sides), list(relations))
    if list(relations) in (["in"], ["notin"]):
        region = classify(sides[1])
        if not isinstance(region, Region | Bracketed | Several | Statement):
            _refuse("an element of what is no set")
        subject = name_of(sides[0])
        return Region(relations[0], (region,), subject) if subject else _refuse("an element that is no name")
    if set(relations) <= {"<", ">", "<=", ">=", "!="}:
        for side in sides:
            if not isinstance(_plain(side), Plain):
                _refuse("an inequality between what are no numbers")
        return Relation(tuple(_strip(side) for side in sides), tuple(relations))
    _refuse("relations that do not go together")


def _strip(side: Expression) -> Expression:
    return side.value if isinstance(side, Measure) else side


def _plain(side: Expression) -> Answer:
    answer = classify(side)
    return Plain(answer.value) if isinstance(answer, Quantity | Percentage) else answer


def _equalities(sides: list[Expression], relations: list[str]) -> Answer:
    """`x = 5`, `x = 2 + 3 = 5 \\approx 5.0`, `3 + 4 = 7`, `2x + y = 3`."""
    if "~" in relations[1:]:  # an approximation of what was said before
        end = relations.index("~", 1)
        sides, relations = sides[: end + 1], relations[:end]
    left, right = sides[0], sides[-1]
    name = name_of(left)
    if name is None and len(sides) == 2 and name_of(right) is not None and not variables(left):
        left, right, name = right, left, name_of(right)
    if name is None and len(sides) > 2:
        name = next((found for side in reversed(sides[:-1]) if (found := name_of(side)) is not None), None)
    if name is not None:
        written = right
        if (
            isinstance(left, Call)
            and left.name.startswith("f:")
            and len(left.args) == 1
            and isinstance(left.args[0], Symbol)
        ):
            right = substitute(right, {left.args[0].name: DUMMY})
        value = classify(right)
        if (
            isinstance(left, Call)
            and left.name == "()"
            and isinstance(value, Bracketed)
            and len(value.parts) == len(left.args)
        ):
            return Named(tuple((name_of(arg) or "?", part) for arg, part in zip(left.args, value.parts, strict=True)))
        return Assignment(name, value, (left, written))
    if not any(variables(side) for side in sides):
        return _arithmetic(sides)
    if len(sides) > 2:
        _refuse("several equations in one")
    for side in sides:
        if not isinstance(_plain(side), Plain):
            _refuse("an equation between what are no numbers")
    return Equation(_strip(left), _strip(right))


def _arithmetic(sides: Sequence[Expression]) -> Answer:
    """`3 + 4 = 7` is 7, and `5 = 6` is nothing."""
    values = [classify(side) for side in sides]
    first, last = (
        value.value if isinstance(value, Plain | Quantity | Percentage) else None for value in (values[0], values[-1])
    )
    if first is not None and last is not None and isinstance(values[0], Plain):
        try:
            if not equal(first, last):
                _refuse("its sides are not equal")
        except UnknownValue:
            _refuse("its sides could not be compared")
    return values[-1]


def name_of(expression: Expression) -> str | None:
    """The name that an expression is, in one writing; `None` if it is no name.

    A name is made of variables alone: `x_1`, `f(x)`, `AB`, `|AB|`, `\\frac{NO}{BO}`, `m + n`, `\\sin A`, `(p, q)`. `2x` is none.
    """
    if isinstance(expression, Symbol):
        return None if expression.name in CONSTANTS - {"e"} else expression.name.replace("{", "").replace("}", "")
    if not isinstance(expression, Call):
        return None
    name = expression.name
    if name.startswith("f:"):
        if len(expression.args) == 1 and isinstance(expression.args[0], Symbol):
            return f"{name[2:]}(·)"
        return f"{name[2:]}({', '.join(map(_written, expression.args))})"
    if name in ("+", "-", "*", "/", "abs", "norm", "ratio", "()", "degree", "neg") or name in (
        "sin",
        "cos",
        "tan",
        "cot",
        "log",
        "ln",
        "conj",
        "max",
        "min",
    ):
        parts = [name_of(arg) for arg in expression.args]
        if all(part is not None for part in parts):
            return f"{name}({', '.join(parts)})"  # type: ignore[arg-type]
    return None


def _written(expression: Expression) -> str:
    if isinstance(expression, Number):
        return str(expression.value)
    return name_of(expression) or repr(expression)


def _base_numeral(args: tuple[Expression, ...]) -> Answer:
    digits, base = args
    assert isinstance(digits, Symbol)
    value = exact_value(base)
    if value is None or value.denominator != 1 or not 2 <= value <= 36:
        _refuse("no base of numerals")
    return BaseNumeral(digits.name.replace(",", "").replace(" ", "").upper(), int(value))


def _builder(args: tuple[Expression, ...]) -> Answer:
    """`\\{x \\mid x > 3\\}` is the region of its condition."""
    if not isinstance(args[0], Symbol) and not (
        isinstance(args[0], Call) and args[0].name == "chain:in" and args[0].args[1] == Call("{R}", ())
    ):
        _refuse("a set by such a condition")
    condition = classify(args[1])
    if isinstance(condition, Relation | Region):
        return Region("and", (condition,))
    _refuse("a set by such a condition")


_BY_NAME: dict[str, Callable[[tuple[Expression, ...]], Answer]] = {
    "%": lambda args: Percentage(args[0]),
    "degree": lambda args: Quantity(args[0], unit_named("deg")),
    "base": _base_numeral,
    "ratio": lambda args: Ratio(tuple(args)),
    "congruent": lambda args: Congruence(*args),
    "{}": lambda args: Several(_flat(args), is_set=True) if args else Statement("nothing"),
    "cup": lambda args: Region("cup", tuple(map(classify, args))),
    "cap": lambda args: Region("cap", tuple(map(classify, args))),
    "minus": lambda args: Region("minus", tuple(map(classify, args))),
    "builder": _builder,
}


def _flat(args: Sequence[Expression]) -> tuple[Answer, ...]:
    inner = _list(args, "list") if len(args) > 1 else classify(args[0])
    return inner.parts if isinstance(inner, Several) else (inner,)
