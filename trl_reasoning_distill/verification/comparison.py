r"""When two answers are the same: one rule for each type of gold answer.

`compare(gold, answer, rules)` is `True`, `False`, or `None` where that could not be computed. `RULES` is the page of rules: the table in the docs is made
from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from trl_reasoning_distill.verification.answers import (
    Answer,
    Assignment,
    BaseNumeral,
    Bracketed,
    Choice,
    Congruence,
    Equation,
    Family,
    Moment,
    Named,
    Percentage,
    Plain,
    Quantity,
    Ratio,
    Region,
    Relation,
    Several,
    Statement,
    Text,
)
from trl_reasoning_distill.verification.equations import equations_equal, relations_equal
from trl_reasoning_distill.verification.expressions import (
    Call,
    Expression,
    Number,
    Symbol,
    is_written_exactly,
    substitute,
    variables,
    walk,
)
from trl_reasoning_distill.verification.units import SINGLE_LETTERS, unit_named
from trl_reasoning_distill.verification.values import UnknownValue, equal, exact_value, numeric_value

DEFAULT_TOLERANCE = 1e-6
Outcome = bool | None


@dataclass(frozen=True)
class Rules:
    """What the caller may set.

    Attributes:
        tolerance: Of numbers that are written with decimals: relative, but absolute beside a gold answer that is an integer.
        units: `compare`: another unit is converted, another kind of unit is wrong; `ignore`: only the numbers count.
        fuzzy: Similarity, of 100, from which a word is taken for the gold word; `None`: never.
    """

    tolerance: float = DEFAULT_TOLERANCE
    units: Literal["compare", "ignore"] = "compare"
    fuzzy: float | None = None


def compare(gold: Answer, answer: Answer, rules: Rules) -> Outcome:
    """Whether two readings are the same answer; gold's type decides."""
    if isinstance(answer, Assignment) and not isinstance(gold, Assignment | Named | Equation | Relation):
        return compare(gold, _value_of(answer), rules)  # a name that gold does not ask for
    if isinstance(answer, Choice) and answer.text and not isinstance(gold, Choice):  # `(B) 5` is 5
        return any(compare(gold, reading, rules) for reading in _readings(answer.text)) or None
    if isinstance(answer, Several) and len(answer.parts) > 1 and _is_single(gold):  # one value, written twice
        return _all(compare(gold, part, rules) for part in answer.parts)
    try:
        return _BY_TYPE[type(gold)](gold, answer, rules)
    except UnknownValue:
        return None


def _value_of(assignment: Assignment) -> Answer:
    """The value as written: that of `f(x) = x^2` is `x^2`."""
    return Plain(assignment.sides[1]) if isinstance(assignment.value, Plain) else assignment.value


def _is_single(gold: Answer) -> bool:
    value = gold.value if isinstance(gold, Assignment) else gold
    return not isinstance(value, Several | Named | Bracketed | Region | Family)


def _readings(text: str) -> tuple[Answer, ...]:
    from trl_reasoning_distill.verification.reading import read  # which imports what this module imports

    return read(text).answers


# Numbers, percentages, quantities


def numbers_equal(gold: Expression, answer: Expression, tolerance: float) -> bool:
    """Whether two expressions have the same value.

    Exactly, if both are written without decimals. Else within the tolerance: relative to their size, but absolute beside a gold answer that is an
    integer (28,800.01 is not 28,800, however large the numbers are).

    Raises:
        UnknownValue: If that cannot be computed.
    """
    exactly = is_written_exactly(gold) and is_written_exactly(answer)
    values = exact_value(gold), exact_value(answer)
    if None not in values:
        if exactly:
            return values[0] == values[1]
        return _close(values[0], values[1], gold, tolerance)  # type: ignore[arg-type]
    if exactly or variables(gold) or variables(answer):
        return _equal_with_any_logarithm(gold, answer)
    if any(isinstance(node, Call) and node.name in ("matrix", "row") for side in (gold, answer) for node in walk(side)):
        return equal(gold, answer)
    left, right = (numeric_value(side) for side in (gold, answer))
    left, right = (float(side) if isinstance(side, Fraction) else side for side in (left, right))
    return bool(abs(left - right) <= tolerance * max(abs(left), abs(right)))


def _equal_with_any_logarithm(gold: Expression, answer: Expression) -> bool:
    """`\\log` is base 10 to some and natural to others; both sides mean the same."""
    if equal(gold, answer):
        return True
    has_log = any(
        isinstance(node, Call) and node.name == "log" and len(node.args) == 1
        for side in (gold, answer)
        for node in walk(side)
    )
    return has_log and equal(gold, answer, log_base=None)


def _close(gold: Fraction, answer: Fraction, written: Expression, tolerance: float) -> bool:
    scale = max(abs(gold), abs(answer))
    if isinstance(written, Number) and written.is_integer:
        scale = min(scale, Fraction(1))
    return abs(gold - answer) <= Fraction(tolerance) * scale


def _compare_plain(gold: Plain, answer: Answer, rules: Rules) -> Outcome:
    match answer:
        case Plain(value):
            return numbers_equal(gold.value, value, rules.tolerance)
        case Percentage(value):  # `50%` answers both 50 and 0.5
            return numbers_equal(gold.value, value, rules.tolerance) or numbers_equal(
                gold.value, _hundredth(value), rules.tolerance
            )
        case Quantity(value, unit, _):
            if numbers_equal(gold.value, value, rules.tolerance):
                return True
            if unit is None or unit.dimension != (("deg", 1),) or not _has_pi(gold.value):
                return False
            return numbers_equal(gold.value, Call("degree", (_scaled(value, unit.factor),)), rules.tolerance)
        case Ratio(terms) if len(terms) == 2:
            return numbers_equal(gold.value, Call("/", terms), rules.tolerance)
        case Several(parts) | Bracketed(_, parts):
            if len(parts) == 1:
                return compare(gold, parts[0], rules)
            return _vector_equal(gold, answer, rules)
        case Named(parts) if len(parts) == 1:
            return compare(gold, parts[0][1], rules)
    return False


def _has_pi(value: Expression) -> bool:
    return any(node == Symbol("pi") for node in walk(value))


def _hundredth(value: Expression) -> Expression:
    return Call("/", (value, Number(Fraction(100), is_integer=True)))


def _scaled(value: Expression, factor: Fraction, offset: Fraction = Fraction(0)) -> Expression:
    scaled = value if factor == 1 else Call("*", (value, Number(factor)))
    return scaled if not offset else Call("+", (scaled, Number(offset)))


def _vector_equal(gold: Plain, answer: Answer, rules: Rules) -> Outcome:
    r"""A row or a column of a matrix may be written as a tuple."""
    if not (isinstance(gold.value, Call) and gold.value.name == "matrix" and isinstance(answer, Bracketed)):
        return False
    if isinstance(answer.parts[0], Bracketed):  # [[1, 2], [3, 4]]
        rows = [part.parts for part in answer.parts if isinstance(part, Bracketed)]
        cells = [[cell.value for cell in row if isinstance(cell, Plain)] for row in rows]
        return numbers_equal(
            gold.value, Call("matrix", tuple(Call("row", tuple(row)) for row in cells)), rules.tolerance
        )
    entries = _entries(gold)
    return entries is not None and _in_order([Plain(entry) for entry in entries], answer.parts, rules)


def _entries(answer: Answer) -> list[Expression] | None:
    """The entries of a matrix with one row or one column."""
    if not (isinstance(answer, Plain) and isinstance(answer.value, Call) and answer.value.name == "matrix"):
        return None
    rows = [row.args for row in answer.value.args if isinstance(row, Call)]
    if len(rows) == 1:
        return list(rows[0])
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else None


def _compare_percentage(gold: Percentage, answer: Answer, rules: Rules) -> Outcome:
    match answer:
        case Percentage(value):
            return numbers_equal(gold.value, value, rules.tolerance)
        case Plain(value):  # the sign left out, or the fraction that it is
            return numbers_equal(gold.value, value, rules.tolerance) or numbers_equal(
                _hundredth(gold.value), value, rules.tolerance
            )
        case Quantity(value, None, _):
            return numbers_equal(gold.value, value, rules.tolerance)
    return False


_ANY_NOUN = frozenset({"unit", "units", "square units", "cubic units", "sq units"})


def _compare_quantity(gold: Quantity, answer: Answer, rules: Rules) -> Outcome:
    match answer:
        case Plain(Call("*", (Number() as value, Symbol(name)))) if name in SINGLE_LETTERS:  # `2h`, beside a quantity
            return _compare_quantity(gold, Quantity(value, unit_named(name)), rules)
        case Plain(value):
            if numbers_equal(gold.value, value, rules.tolerance):
                return True
            is_angle = gold.unit is not None and gold.unit.dimension == (("deg", 1),) and _has_pi(value)
            return is_angle and numbers_equal(Call("degree", (gold.value,)), value, rules.tolerance)
        case Quantity(value, unit, noun):
            if rules.units == "ignore":
                return numbers_equal(gold.value, value, rules.tolerance)
            if gold.unit is None or unit is None:
                if gold.unit is None and unit is None:
                    fits = _same_noun(gold.noun, noun)
                else:
                    fits = (noun if unit is None else gold.noun) in _ANY_NOUN
                return fits and numbers_equal(gold.value, value, rules.tolerance)
            return _same_amount(gold, answer, rules)
    return False


def _same_amount(gold: Quantity, answer: Quantity, rules: Rules) -> bool:
    assert gold.unit is not None
    assert answer.unit is not None
    if gold.unit == answer.unit or (gold.unit.factor, gold.unit.dimension, gold.unit.offset) == (
        answer.unit.factor,
        answer.unit.dimension,
        answer.unit.offset,
    ):
        return numbers_equal(gold.value, answer.value, rules.tolerance)
    names = {gold.unit.name, answer.unit.name}
    if {gold.unit.dimension, answer.unit.dimension} == {(("deg", 1),), (("rad", 1),)}:
        sides = [side.value if _is_radian(side) else Call("degree", (side.value,)) for side in (gold, answer)]
        return numbers_equal(sides[0], sides[1], rules.tolerance)
    if gold.unit.dimension != answer.unit.dimension:
        is_bare_degree = names & {"°"} and names & {"°C", "°F"}
        return bool(is_bare_degree) and numbers_equal(gold.value, answer.value, rules.tolerance)
    sides = [
        _scaled(side.value, side.unit.factor, side.unit.offset) for side in (gold, answer) if side.unit is not None
    ]
    return numbers_equal(sides[0], sides[1], rules.tolerance)


def _is_radian(quantity: Quantity) -> bool:
    return quantity.unit is not None and quantity.unit.dimension == (("rad", 1),)


def _same_noun(gold: str, answer: str) -> bool:
    """`apples`, `apple` and `red apples` are apples."""
    if not gold or not answer:
        return True
    words = [{word.removesuffix("s").removesuffix("e") for word in noun.split()} for noun in (gold, answer)]
    return words[0] <= words[1] or words[1] <= words[0]


def _compare_ratio(gold: Ratio, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, Plain) and len(gold.terms) == 2:
        return numbers_equal(Call("/", gold.terms), answer.value, rules.tolerance)
    if not isinstance(answer, Ratio) or len(answer.terms) != len(gold.terms):
        return False
    if any(isinstance(term, Symbol) and term.name == "..." for term in gold.terms + answer.terms):
        return all(numbers_equal(a, b, rules.tolerance) for a, b in zip(gold.terms, answer.terms, strict=True))
    first, other = gold.terms[0], answer.terms[0]
    return all(
        numbers_equal(Call("*", (a, other)), Call("*", (b, first)), rules.tolerance)
        for a, b in zip(gold.terms[1:], answer.terms[1:], strict=True)
    )


# Several parts


def _in_order(gold: Sequence[Answer], answer: Sequence[Answer], rules: Rules) -> Outcome:
    if len(gold) != len(answer):
        return False
    return _all(compare(a, b, rules) for a, b in zip(gold, answer, strict=True))


def _all(outcomes: object) -> Outcome:
    """`False` if any is, else `None` if any is, else `True`."""
    found = list(outcomes)  # type: ignore[call-overload]
    return False if False in found else None if None in found else True


_MAX_PARTS = 60


def _in_any_order(gold: Sequence[Answer], answer: Sequence[Answer], rules: Rules, as_set: bool) -> Outcome:
    """Each part has a twin on the other side: its own, or in a set, any."""
    if max(len(gold), len(answer)) > _MAX_PARTS:
        return _in_order(gold, answer, rules)
    if not as_set and len(gold) != len(answer):
        return False
    table = [[compare(a, b, rules) for b in answer] for a in gold]
    if as_set:
        lines = [*table, *map(list, zip(*table, strict=True))]
        return _all(True if True in line else None if None in line else False for line in lines)
    free = set(range(len(answer)))
    unknown = False
    for row in table:
        twin = next((index for index in sorted(free) if row[index]), None)
        if twin is None:
            if not any(row[index] is None for index in free):
                return False
            unknown = True
        else:
            free.discard(twin)
    return None if unknown else True


def _compare_bracketed(gold: Bracketed, answer: Answer, rules: Rules) -> Outcome:
    entries = _entries(answer)
    if entries is not None:
        return gold.brackets in ("()", "[]", "<>") and _in_order(gold.parts, [Plain(entry) for entry in entries], rules)
    match answer:
        case Plain(Call("matrix")):
            return _vector_equal(answer, gold, rules)
        case Bracketed(brackets, parts):
            if len(gold.parts) != len(parts):
                return False
            if gold.brackets != brackets and not (
                {gold.brackets, brackets} <= {"()", "<>", "[]"}
                and (len(parts) != 2 or "<>" in (gold.brackets, brackets))
            ):
                return False
            return _in_order(gold.parts, parts, rules)
        case Several(parts, False):
            return gold.brackets in ("()", "<>") and _in_order(gold.parts, parts, rules)
        case Named(parts):
            return _in_order(gold.parts, [value for _, value in sorted(parts, key=lambda part: part[0])], rules)
        case Region() | Relation() | Statement("reals"):
            return _compare_region(gold, answer, rules)
    return False


def _compare_several(gold: Several, answer: Answer, rules: Rules) -> Outcome:
    match answer:
        case Several(parts, is_set):
            if any(part == Plain(Symbol("...")) for part in (*gold.parts, *parts)):
                return _in_order(gold.parts, parts, rules)
            if _has_nouns(gold.parts) and not _has_nouns(parts):
                return _in_order(gold.parts, parts, rules)
            as_set = gold.is_set or is_set or all(isinstance(part, Bracketed) for part in gold.parts)
            return _in_any_order(gold.parts, parts, rules, as_set)
        case Bracketed(brackets, parts):
            if len(gold.parts) == 1:
                return compare(gold.parts[0], answer, rules)
            return not gold.is_set and brackets in ("()", "[]") and _in_order(gold.parts, parts, rules)
        case Named(parts):
            return _in_any_order(gold.parts, [value for _, value in parts], rules, gold.is_set)
        case Relation() | Region():
            return False
    return len(gold.parts) == 1 and compare(gold.parts[0], answer, rules)


def _has_nouns(parts: Sequence[Answer]) -> bool:
    return len({part.noun for part in parts if isinstance(part, Quantity) and part.unit is None}) > 1


def _by_name(named: Named) -> dict[str, list[Answer]]:
    values: dict[str, list[Answer]] = {}
    for name, value in named.parts:
        values.setdefault(name, []).append(value)
    return values


def _compare_named(gold: Named, answer: Answer, rules: Rules) -> Outcome:
    values = [value for _, value in gold.parts]
    if isinstance(answer, Assignment):
        answer = Named(((answer.name, answer.value),))
    match answer:
        case Named():
            left, right = _by_name(gold), _by_name(answer)
            if set(left) != set(right):
                return False
            return _all(_in_any_order(left[name], right[name], rules, as_set=False) for name in left)
        case Several(parts) | Bracketed(_, parts):
            bases = {name.partition("_")[0] for name, _ in gold.parts}
            if len(bases) == 1 and isinstance(answer, Several):  # x_1 and x_2 are the roots of one equation
                return _in_any_order(values, parts, rules, as_set=False)
            return _in_order(values, parts, rules)
    return len(values) == 1 and compare(values[0], answer, rules)


def _compare_assignment(gold: Assignment, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, Assignment):
        if gold.name == answer.name:
            found = compare(gold.value, answer.value, rules)
            if found:
                return True
        elif not (variables(gold.sides[1]) or variables(answer.sides[1])):
            return False
        return equations_equal(gold.sides, answer.sides)
    if isinstance(answer, Equation):
        return equations_equal(gold.sides, (answer.left, answer.right))
    if isinstance(answer, Named):
        return all(name == gold.name for name, _ in answer.parts) and compare(
            gold.value, Several(tuple(value for _, value in answer.parts)), rules
        )
    return compare(_value_of(gold), answer, rules)


def _compare_equation(gold: Equation, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, Equation):
        return equations_equal((gold.left, gold.right), (answer.left, answer.right))
    return isinstance(answer, Assignment) and equations_equal((gold.left, gold.right), answer.sides)


# Regions of the real line


def _compare_region(gold: Answer, answer: Answer, rules: Rules) -> Outcome:
    from trl_reasoning_distill.verification.regions import region_of, regions_equal, subjects_of

    if isinstance(answer, Plain | Quantity | Percentage | Text | Choice | Ratio):
        return False
    subjects = subjects_of(gold), subjects_of(answer)
    left, right = region_of(gold), region_of(answer)
    if left is not None and right is not None:
        if all(subjects) and subjects[0] != subjects[1]:
            return False
        return regions_equal(left, right, rules.tolerance)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return relations_equal(gold, answer, functools.partial(numbers_equal, tolerance=rules.tolerance))
    if isinstance(gold, Region) and isinstance(answer, Region) and gold.operation == answer.operation:
        if gold.parts or answer.parts:
            return _in_any_order(gold.parts, answer.parts, rules, as_set=True)
        return True
    if isinstance(gold, Region) and gold.operation in ("in", "and") and len(gold.parts) == 1:
        return compare(gold.parts[0], answer, rules)
    if isinstance(answer, Region) and answer.operation in ("in", "and") and len(answer.parts) == 1:
        return compare(gold, answer.parts[0], rules)
    return False


# The rest


def _compare_congruence(gold: Congruence, answer: Answer, rules: Rules) -> Outcome:
    if (
        not isinstance(answer, Congruence)
        or not (Symbol("·") in (gold.subject, answer.subject) or numbers_equal(gold.subject, answer.subject, 0.0))
        or not numbers_equal(gold.modulus, answer.modulus, 0.0)
    ):
        return False
    modulus, residues = exact_value(gold.modulus), [exact_value(side.residue) for side in (gold, answer)]
    if modulus and None not in residues:
        return (residues[0] - residues[1]) % modulus == 0  # type: ignore[operator]
    return numbers_equal(gold.residue, answer.residue, 0.0)


def _compare_family(gold: Family, answer: Answer, rules: Rules) -> Outcome:
    if not isinstance(answer, Family) or len(gold.conditions) != len(answer.conditions):
        return False
    gold, answer = _with_one_parameter(gold), _with_one_parameter(answer)
    if set(gold.conditions) != set(answer.conditions):
        return False
    return _in_any_order(gold.values, answer.values, rules, as_set=False)


def _with_one_parameter(family: Family) -> Family:
    """What the parameter is called does not matter."""
    if (
        len(family.conditions) != 1
        or not isinstance(family.conditions[0], Call)
        or not isinstance(family.conditions[0].args[0], Symbol)
    ):
        return family
    names: dict[str, Expression] = {family.conditions[0].args[0].name: Symbol("·")}
    values = tuple(_renamed(value, names) for value in family.values)
    return Family(values, (substitute(family.conditions[0], names),))


def _renamed(value: Answer, names: dict[str, Expression]) -> Answer:
    if isinstance(value, Plain):
        return Plain(substitute(value.value, names))
    if isinstance(value, Assignment):
        sides = (value.sides[0], substitute(value.sides[1], names))
        return Assignment(value.name, _renamed(value.value, names), sides)
    return value


def _compare_base(gold: BaseNumeral, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, BaseNumeral):
        return (gold.digits.lstrip("0"), gold.base) == (answer.digits.lstrip("0"), answer.base)
    if (
        isinstance(answer, Plain) and isinstance(answer.value, Number) and answer.value.is_integer
    ):  # the base that was asked for
        return str(answer.value.value) == gold.digits.lstrip("0")
    return False


def _compare_choice(gold: Choice, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, Choice):
        if gold.letters != answer.letters:
            return False
        if gold.text and answer.text:
            return _texts_equal(gold.text, answer.text, rules)
        return True
    return any(compare(reading, answer, rules) for reading in _readings(gold.text)) if gold.text else False


def _texts_equal(gold: str, answer: str, rules: Rules) -> bool:
    return gold == answer or any(compare(a, b, rules) for a in _readings(gold) for b in _readings(answer))


def _compare_moment(gold: Moment, answer: Answer, rules: Rules) -> Outcome:
    if not isinstance(answer, Moment):
        return (
            isinstance(answer, Plain)
            and gold.minutes is None
            and gold.month is None
            and answer.value == Number(Fraction(gold.year or 0), True)
        )
    if (gold.minutes is None) != (answer.minutes is None) or gold.seconds != answer.seconds:
        return False
    if gold.minutes is not None and answer.minutes is not None:
        left_out = (gold.half is None) != (answer.half is None) and min(gold.minutes, answer.minutes) < 720
        bare = gold if gold.half is None else answer
        if left_out and bare.minutes is not None and bare.minutes < 780:  # `3:30` for `3:30 p.m.`
            return gold.minutes % 720 == answer.minutes % 720
        return gold.minutes == answer.minutes
    if gold.year and answer.year and gold.year != answer.year:
        return False
    return (gold.month, gold.day) == (answer.month, answer.day)


def _compare_statement(gold: Statement, answer: Answer, rules: Rules) -> Outcome:
    if isinstance(answer, Statement):
        return gold.kind == answer.kind
    if gold.kind == "reals":
        return _compare_region(Region("{R}", ()), answer, rules)
    if gold.kind == "nothing" and isinstance(answer, Region):
        from trl_reasoning_distill.verification.regions import region_of

        return region_of(answer) == ()
    return False


def _compare_text(gold: Text, answer: Answer, rules: Rules) -> Outcome:
    if not isinstance(answer, Text):
        return False
    if gold.words == answer.words:
        return True
    return rules.fuzzy is not None and similarity(gold.words, answer.words) >= rules.fuzzy


def similarity(gold: Sequence[str], answer: Sequence[str]) -> float:
    """How alike two texts are, of 100, in their order or sorted."""
    from rapidfuzz import fuzz

    left, right = " ".join(gold), " ".join(answer)
    return max(fuzz.ratio(left, right), fuzz.token_sort_ratio(left, right))


Rule = Callable[..., Outcome]
RULES: tuple[tuple[type, str, str, Rule], ...] = (
    (Plain, "number, expression, matrix", "The same value: exactly if both are written without decimals, else within the tolerance. A unit, a name or a percent sign more is no mistake: 50 is met by 50% and 0.5, too. An expression must agree as a function of its variables, a matrix entry by entry.", _compare_plain),
    (Percentage, "percentage", "15% is met by 15%, by 15 (the sign left out) and by 0.15 or 3/20 (what it is).", _compare_percentage),
    (Quantity, "quantity", "A missing unit is forgiven, another unit is converted (200 min is 3 h 20 min), another kind of unit or another noun is wrong. With `units=\"ignore\"` only the numbers count.", _compare_quantity),
    (Ratio, "ratio", "Proportional terms; two terms are also their quotient.", _compare_ratio),
    (Bracketed, "tuple, vector, interval", "Brackets and order count; a vector may be a column or a row; an interval may be an inequality.", _compare_bracketed),
    (Several, "set, list, ±", "In any order. In a list every value counts as often as it stands there; in a set `\\{…\\}`, and among points, once.", _compare_several),
    (Named, "named values", "By their names, in any order; without names in gold's order.", _compare_named),
    (Assignment, "name = value", "The value; a missing name is forgiven, another name is wrong.", _compare_assignment),
    (Equation, "equation", "A multiple of it, or it solved for a variable.", _compare_equation),
    (Relation, "inequality", "The same set of numbers, or the same relation: turned round, or multiplied.", _compare_region),
    (Region, "union, set of numbers", "The same set of numbers, however it is made.", _compare_region),
    (Congruence, "congruence", "The same modulus, and residues that differ by a multiple of it.", _compare_congruence),
    (Family, "values with a parameter", "The same values and conditions; the parameter's name does not matter.", _compare_family),
    (BaseNumeral, "numeral in a base", "The same digits and base; the base may be left out.", _compare_base),
    (Choice, "choice", "The same letter or letters; where both give the option's text, the same text. The text alone will do if gold has it.", _compare_choice),
    (Moment, "date, time", "The same day or time, however written; a year, a.m. or p.m. may be left out.", _compare_moment),
    (Statement, "yes, no, none, undefined, infinite", "The same statement, in any of eight languages.", _compare_statement),
    (Text, "text", "The same words but for case, articles and punctuation. A near miss only if `fuzzy` asks for it.", _compare_text),
)  # fmt: skip
"""Type of the gold answer, its name, its rule in words, and in code."""
_BY_TYPE: dict[type, Rule] = {kind: rule for kind, _, _, rule in RULES}
