r"""What an expression is worth: exactly where it is rational, else to so many digits; and whether two expressions are equal.

`equal(a, b)` evaluates both at a few points, drawn from the names of their variables, with 40 digits and, where the two nearly agree, with 90. A
difference that shrinks with the digits is rounding; one that stays is a difference, however tiny the values are (1/2006! is not 1/2004!).
Nothing here can run long: exponents, factorials and arguments have limits, beyond which a value is `Unknown`.
"""

from __future__ import annotations

import functools
import math
import threading
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from trl_reasoning_distill.verification.expressions import Call, Expression, Number, Symbol, variables, walk

DIGITS = (40, 90)
_MAX_BITS = 40_000
_MAX_FACTORIAL = 5000
_MAX_EXPONENT = 1e7  # of the number 2, in a power
_MAX_NODES = 600
_MAX_DEPTH = 60
_MAX_TERMS = 2000
_POINTS = 4

Value = Any
"""A `Fraction`, an mpmath number, or a tuple of rows for a matrix."""


class UnknownValue(Exception):  # noqa: N818 - not a mistake of anybody
    """An expression has no value here: undefined, too large to compute, or of a kind that takes calculus."""


class _Contexts(threading.local):
    """mpmath's contexts, of one thread: some functions change a context's precision while they run."""

    def __init__(self) -> None:
        from mpmath.ctx_mp import MPContext

        self.contexts = {}
        for digits in DIGITS:
            context = MPContext()
            context.dps = digits
            self.contexts[digits] = context


_contexts: _Contexts | None = None


def _context(digits: int) -> Any:
    global _contexts
    if _contexts is None:  # mpmath is imported when it is first needed: numbers never are
        _contexts = _Contexts()
    return _contexts.contexts[digits]


def exact_value(expression: Expression) -> Fraction | None:
    """The value of an expression that is a rational number by arithmetic alone; `None` if it is not."""
    if isinstance(expression, Number):
        return expression.value
    try:
        value = Evaluator(None, {}).value(expression)
    except UnknownValue:
        return None
    return value if isinstance(value, Fraction) else None


def numeric_value(
    expression: Expression, digits: int = DIGITS[0], point: Mapping[str, Value] | None = None, log_base: int | None = 10
) -> Value:
    """The value of an expression with these values of its variables.

    Raises:
        UnknownValue: If it has none, or none that can be computed in a moment.
    """
    return Evaluator(_context(digits), point or {}, log_base).value(expression)


class Evaluator:
    """Computes values; without an mpmath context only exact ones.

    Args:
        context: mpmath's, or `None`.
        point: The values of the variables.
        log_base: Of `\\log` without a base; `None`: natural.
    """

    def __init__(self, context: Any, point: Mapping[str, Value], log_base: int | None = 10) -> None:
        self.context, self.point, self.log_base = context, point, log_base

    def value(self, expression: Expression) -> Value:
        """Evaluate; see `numeric_value`."""
        if any(count > _MAX_NODES for count, _ in enumerate(walk(expression))):
            raise UnknownValue("too long to compute")
        try:
            return self._value(expression, 0)
        except UnknownValue:
            raise
        except (ArithmeticError, ValueError, TypeError, NotImplementedError, RecursionError) as error:
            raise UnknownValue(f"it has no value ({type(error).__name__})") from None
        except Exception as error:  # mpmath's own, such as NoConvergence
            raise UnknownValue(f"it could not be computed ({type(error).__name__})") from None

    def _value(self, node: Expression, depth: int) -> Value:
        if depth > _MAX_DEPTH:
            raise UnknownValue("too deeply nested")
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Symbol):
            return self._symbol(node.name)
        if not isinstance(node, Call):
            raise UnknownValue("an amount with a unit where a number is wanted")
        rule = _RULES.get(node.name)
        if rule is None:
            if node.name.startswith("f:"):
                return self._unknown_function(node.name, [self._value(arg, depth + 1) for arg in node.args])
            raise UnknownValue(f"{node.name.strip(chr(92))!r} has no value")
        if node.name in ("sum", "prod"):
            return rule(self, node, depth)
        return rule(self, *[self._value(arg, depth + 1) for arg in node.args])

    def _symbol(self, name: str) -> Value:
        if name in self.point:
            return self.point[name]
        mp = self.mp
        if name in ("pi", "e"):
            return +getattr(mp, name)
        if name == "i":
            return mp.mpc(0, 1)
        if name == "oo":
            return mp.inf
        raise UnknownValue(f"the variable {name} has no value")

    @property
    def mp(self) -> Any:
        if self.context is None:
            raise UnknownValue("not rational")
        return self.context

    def real(self, value: Value) -> Value:
        """A value as mpmath's, which must be a number."""
        if isinstance(value, Fraction):
            return self.mp.mpf(value.numerator) / value.denominator
        if isinstance(value, tuple):
            raise UnknownValue("a matrix where a number is wanted")
        return value

    def small(self, value: Value, limit: float = 1e9) -> Value:
        """A value that a transcendental function may be asked for."""
        value = self.real(value)
        if abs(value) > limit:
            raise UnknownValue("too large to compute")
        return value

    def _unknown_function(self, name: str, values: list[Value]) -> Value:
        """Some smooth function that belongs to the name alone: `f(x)` equals `f(x)`, and nothing else."""
        seed = zlib.crc32(name.encode()) % 9973
        total = self.mp.mpf(seed) / 1009
        for place, value in enumerate(values, start=2):
            total += self.mp.sin(self.small(value) * (seed % 89 + place) / 7) * (place + 1)
        return total


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _arithmetic(name: str) -> Callable[..., Value]:
    def compute(run: Evaluator, left: Value, right: Value) -> Value:
        if isinstance(left, tuple) or isinstance(right, tuple):
            return _matrix_arithmetic(run, name, left, right)
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            if name == "/" and not right:
                raise UnknownValue("division by zero")
            if _bits(left) + _bits(right) < _MAX_BITS:
                return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[name](right)
        left, right = run.real(left), run.real(right)
        if name == "/":
            if not right:
                raise UnknownValue("division by zero")
            return left / right
        return left + right if name == "+" else left - right if name == "-" else left * right

    return compute


def _matrix_arithmetic(run: Evaluator, name: str, left: Value, right: Value) -> Value:
    plain = _arithmetic(name)
    if isinstance(left, tuple) and isinstance(right, tuple):
        if name in "+-" and [len(row) for row in left] == [len(row) for row in right]:
            return tuple(
                tuple(plain(run, a, b) for a, b in zip(*rows, strict=True)) for rows in zip(left, right, strict=True)
            )
        if name == "*" and len(left[0]) == len(right):
            add, times = _arithmetic("+"), _arithmetic("*")
            columns = list(zip(*right, strict=True))
            return tuple(
                tuple(
                    functools.reduce(
                        functools.partial(add, run), [times(run, a, b) for a, b in zip(row, column, strict=True)]
                    )
                    for column in columns
                )
                for row in left
            )
        raise UnknownValue("matrices that do not fit")
    if name == "*" and isinstance(right, tuple):
        left, right = right, left
    if name in "*/" and not isinstance(right, tuple):
        return tuple(tuple(plain(run, cell, right) for cell in row) for row in left)
    raise UnknownValue("a matrix and a number")


def _power(run: Evaluator, base: Value, exponent: Value) -> Value:
    if isinstance(base, tuple):
        raise UnknownValue("a power of a matrix")
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        if not base and exponent < 0:
            raise UnknownValue("division by zero")
        if abs(exponent) * _bits(base) < _MAX_BITS:
            return base ** int(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and base >= 0 and exponent.denominator <= 12:
        above, below = (_integer_root(part, exponent.denominator) for part in (base.numerator, base.denominator))
        is_small = abs(exponent.numerator) * _bits(base) < _MAX_BITS
        if above is not None and below is not None and is_small and (base or exponent > 0):
            return Fraction(above, below) ** exponent.numerator
    base, exponent = run.real(base), run.real(exponent)
    if not base:
        if exponent.real > 0:
            return Fraction(0)
        raise UnknownValue("a power of zero")
    size = abs(run.mp.log(abs(base))) + 4
    if abs(exponent) * size > _MAX_EXPONENT:
        raise UnknownValue("too large a power")
    return run.mp.power(base, exponent)


def _integer_root(value: int, degree: int) -> int | None:
    """The exact root of a natural number, if it has one."""
    if degree == 1 or value < 2:
        return value
    if value.bit_length() > 4000:
        return None
    low = math.isqrt(value) if degree == 2 else round(value ** (1 / degree)) if value.bit_length() < 900 else 0
    return next((root for root in (low - 1, low, low + 1) if root**degree == value), None)


def _root(run: Evaluator, value: Value, degree: Value = Fraction(2)) -> Value:
    """Of a negative number the real root, if its degree is odd."""
    if not isinstance(degree, Fraction) or not degree:
        raise UnknownValue("a root of such a degree")
    number: Value = value if isinstance(value, Fraction) else run.real(value)
    if not number.imag and number.real < 0 and degree.denominator == 1 and degree % 2:
        return -_power(run, -number.real, 1 / degree)
    return number if not number else _power(run, number, 1 / degree)


def _factorial(run: Evaluator, value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
        if isinstance(value, Fraction):
            raise UnknownValue("a factorial of no small natural number")
        return run.mp.gamma(run.small(value, 1e4) + 1)
    return Fraction(math.factorial(int(value)))


def _binomial(run: Evaluator, above: Value, below: Value) -> Value:
    whole = [isinstance(x, Fraction) and x.denominator == 1 for x in (above, below)]
    if all(whole) and 0 <= below <= above <= _MAX_FACTORIAL:
        return Fraction(math.comb(int(above), int(below)))
    if not all(whole):
        return run.mp.binomial(run.small(above, 1e4), run.small(below, 1e4))
    raise UnknownValue("such a binomial coefficient")


def _log(run: Evaluator, value: Value, base: Value = None) -> Value:
    number = run.real(value)
    if not number:
        raise UnknownValue("the logarithm of zero")
    if base is None:
        base = run.log_base
        return run.mp.log(number) if base is None else run.mp.log(number) / run.mp.log(base)
    divisor = run.mp.log(run.real(base))
    if not divisor:
        raise UnknownValue("a logarithm of base 1")
    return run.mp.log(number) / divisor


def _function(name: str, limit: float = 1e9) -> Callable[..., Value]:
    def compute(run: Evaluator, value: Value) -> Value:
        return getattr(run.mp, name)(run.small(value, limit))

    return compute


def _integers(name: str) -> Callable[..., Value]:
    def compute(run: Evaluator, *values: Value) -> Value:
        if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
            raise UnknownValue(f"the {name} of no integers")
        return Fraction(getattr(math, name)(*map(int, values)))

    return compute


def _extreme(choose: Callable[..., Value]) -> Callable[..., Value]:
    def compute(run: Evaluator, *values: Value) -> Value:
        return (
            choose(values)
            if all(isinstance(value, Fraction) for value in values)
            else choose([run.real(value) for value in values])
        )

    return compute


def _absolute(run: Evaluator, value: Value) -> Value:
    return abs(value if isinstance(value, Fraction) else run.real(value))


def _rounded(name: str) -> Callable[..., Value]:
    def compute(run: Evaluator, value: Value) -> Value:
        if isinstance(value, Fraction):
            return Fraction(getattr(math, name)(value))
        return getattr(run.mp, name)(run.small(value, 1e30))

    return compute


def _repeated(run: Evaluator, node: Call, depth: int) -> Value:
    """A sum or product over few integers: `sum(term, index, first, last)`."""
    term, index, first, last = node.args
    low, high = run._value(first, depth + 1), run._value(last, depth + 1)
    if not (
        isinstance(low, Fraction)
        and isinstance(high, Fraction)
        and low.denominator == high.denominator == 1
        and high - low < _MAX_TERMS // 10
    ):
        raise UnknownValue("too many terms")
    assert isinstance(index, Symbol)
    combine = _arithmetic("+" if node.name == "sum" else "*")
    total: Value = Fraction(0 if node.name == "sum" else 1)
    for number in range(int(low), int(high) + 1):
        inner = Evaluator(run.context, {**run.point, index.name: Fraction(number)}, run.log_base)
        total = combine(run, total, inner._value(term, depth + 1))
    return total


def _matrix(run: Evaluator, *rows: Value) -> Value:
    if len({len(row) for row in rows}) != 1:
        raise UnknownValue("rows of different lengths")
    return tuple(rows)


_RULES: dict[str, Callable[..., Value]] = {
    **{name: _arithmetic(name) for name in "+-*/"},
    "neg": lambda run, value: _arithmetic("*")(run, Fraction(-1), value),
    "^": _power,
    "sqrt": _root,
    "!": _factorial,
    "binom": _binomial,
    "abs": _absolute,
    "floor": _rounded("floor"),
    "ceil": _rounded("ceil"),
    "gcd": _integers("gcd"),
    "lcm": _integers("lcm"),
    "max": _extreme(max),
    "min": _extreme(min),
    "ln": lambda run, value: run.mp.log(run.real(value)) if value else _log(run, value),
    "lg": lambda run, value: _log(run, value, Fraction(10)),
    "log": _log,
    "exp": lambda run, value: run.mp.exp(run.small(value, _MAX_EXPONENT)),
    "degree": lambda run, value: run.real(value) * run.mp.pi / 180,
    "%": lambda run, value: _arithmetic("/")(run, value, Fraction(100)),
    "conj": lambda run, value: run.mp.conj(run.real(value)),
    "sum": _repeated,
    "prod": _repeated,
    "row": lambda run, *cells: tuple(cells),
    "matrix": _matrix,
    **{
        name: _function(name)
        for name in ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "acot", "asec", "acsc")
    },
    **{
        name: _function(name, 1e4)
        for name in ("sinh", "cosh", "tanh", "sech", "csch", "coth", "asinh", "acosh", "atanh")
    },
}


def point_for(names: frozenset[str], number: int, digits: int) -> dict[str, Value]:
    """Arbitrary values for variables, the same in every process; negative ones at every second point."""
    mp = _context(digits)
    values = {}
    for name in names:
        seed = zlib.crc32(f"{name} {number}".encode())
        size = Fraction(seed % 99991, 31337) + Fraction(1, 7)
        values[name] = mp.mpf(size.numerator) / size.denominator * (-1 if number % 2 and seed & 64 else 1)
    return values


def is_zero(difference: Callable[[int], tuple[Value, Value]]) -> bool:
    """Whether two values are the same number: `difference(digits)` computes both.

    Raises:
        UnknownValue: If they cannot be computed.
    """
    previous: Value = None
    for digits in DIGITS:
        left, right = difference(digits)
        if isinstance(left, tuple) or isinstance(right, tuple):
            raise UnknownValue("a matrix where a number is wanted")
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left == right
        mp = _context(digits)
        left, right = (mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in (left, right))
        if mp.isnan(left) or mp.isnan(right):
            raise UnknownValue("it is not a number")
        if mp.isinf(left) or mp.isinf(right):
            return bool(left == right)
        gap, size = abs(left - right), max(abs(left), abs(right))
        if not gap:
            return True
        if gap > size * mp.mpf(10) ** (12 - DIGITS[0]):
            # Rounding, too, is as large as its size, where everything cancels; with more digits it shrinks.
            if previous is not None:
                return bool(gap < previous * mp.mpf(10) ** (-(DIGITS[1] - DIGITS[0]) + 12))
            if size > mp.mpf(10) ** (10 - DIGITS[0]):
                return False
        elif previous is not None:
            return True
        previous = gap
    return True


def equal(a: Expression, b: Expression, log_base: int | None = 10) -> bool:
    """Whether two expressions are the same number, matrix, or function of their variables.

    A point at which one of the two has no real value (`\\ln x` of a negative number) tells nothing, if it is written without i.

    Raises:
        UnknownValue: If that cannot be computed.
    """
    if a == b:
        return True
    names = variables(a) | variables(b)
    if variables(a) != variables(b) and not names:
        return False
    is_complex = any(isinstance(node, Symbol) and node.name == "i" for side in (a, b) for node in walk(side))
    points = _POINTS if names else 1
    seen = 0
    for number in range(points):
        try:
            agrees = _agree_at(a, b, names, number, log_base, is_complex or not names)
        except UnknownValue:
            if not names:
                raise
            continue
        if agrees is None:
            continue
        if not agrees:
            return False
        seen += 1
    if not seen:
        raise UnknownValue("it could not be computed at any point")
    return True


def _agree_at(
    a: Expression, b: Expression, names: frozenset[str], number: int, log_base: int | None, complex_counts: bool
) -> bool | None:
    def both(digits: int) -> tuple[Value, Value]:
        point = point_for(names, number, digits) if names else {}
        return numeric_value(a, digits, point, log_base), numeric_value(b, digits, point, log_base)

    left, right = both(DIGITS[0])
    if isinstance(left, tuple) or isinstance(right, tuple):
        if not (isinstance(left, tuple) and isinstance(right, tuple)) or [len(row) for row in left] != [
            len(row) for row in right
        ]:
            return False
        places = [
            (i, j)
            for i, row in enumerate(left)
            for j in range(len(row))
            if complex_counts or not (_imaginary(left[i][j]) or _imaginary(right[i][j]))
        ]
        return all(is_zero(lambda digits, i=i, j=j: tuple(value[i][j] for value in both(digits))) for i, j in places)  # type: ignore[misc]
    if not complex_counts and (_imaginary(left) or _imaginary(right)):
        return None
    return is_zero(both)


def _imaginary(value: Value) -> bool:
    imaginary = getattr(value, "imag", 0)
    return bool(imaginary) and abs(imaginary) > abs(value) * 1e-30
