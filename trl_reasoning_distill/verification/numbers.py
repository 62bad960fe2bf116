r"""Numbers as people and models write them, read without sympy: `parse_number("$1,080.50")`.

Currency, thousands separators, decimal commas, percent, fractions (`10/9`, `\frac{10}{9}`), mixed numbers (`2 1/2`), scientific
notation, degrees and units are read; anything else is `None`, and left to the symbolic comparison.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MAX_LENGTH = 200
_MAX_EXPONENT = 300
_PLAIN = (
    r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d*)?|\d{1,3}(?: \d{3})+(?!\d)(?:\.\d*)?|\d+,\d+(?![\d,])|\d+(?:\.\d*)?|\.\d+"
)
_SCIENTIFIC = r"(?:[eE]([-+]?\d{1,4})|(?:\*|×|x|\\times|\\cdot) ?10\^?\{?([-+]?\d{1,4})\}?)?"
_NUMBER = re.compile(
    rf"([-+]?) ?(?:(?:(\d+) )?(\d+) ?/ ?(\d+)|(\d+)? ?\\frac\{{(-?\d+)\}}\{{(\d+)\}}|\\frac(\d)(\d)|({_PLAIN}) ?{_SCIENTIFIC})"
)
_PERCENT = re.compile(r"^ ?(?:%|percent\b|pct\b|percentage\b)", re.IGNORECASE)
# A unit is words, possibly per something: `cm^2`, `miles per hour`, `km/h`. Operators and digits are none.
_UNIT = re.compile(r"[ A-Za-z.°µ²³€£¥]*(?:\^\{?\d\}?)?(?:/ ?[A-Za-z]+)?[ A-Za-z.]*")
# What is no word of three letters is a unit only if it stands here: `2xy`, `5r^5`, `3i` and `2pi` are no amounts.
_SHORT_UNITS = frozenset({
    "m", "g", "s", "h", "l", "L", "V", "W", "J", "N", "C", "F", "cm", "mm", "km", "nm", "in", "ft", "yd", "mi", "sq", "cu", "kg", "mg", "lb", "oz",
    "ml", "mL", "cl", "dl", "hr", "Hz", "kW", "MW", "kJ", "Pa", "eV", "kV", "mA", "am", "pm", "st", "nd", "rd", "th",
    "mph", "kph", "rpm", "hrs", "min", "sec", "mol", "gal", "lbs", "deg", "pct", "USD", "EUR", "GBP",
})  # fmt: skip
_LENGTHS = frozenset({"m", "cm", "mm", "km", "in", "ft", "yd", "mi"})
_NAME_OR_SUM = re.compile(r" *[A-Za-z][A-Za-z_{}\d]{0,10} *|[-+*/×÷().=\d $]+")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|textnormal) ?\{([^{}]*)\}")
_DROPPED = {
    ",\\! ": ",", "\\left": "", "\\right": "", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\!": "", "\\,": "", "\\;": " ", "\\ ": " ", "~": " ",
    "^{\\circ}": "", "^\\circ": "", "\\circ": "", "\\degree": "", "°": "", "\\%": "%", "\\$": "$", "−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "{,}": ",",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """An exact value and how it was written.

    Attributes:
        value: What it is worth; a percent sign is left out.
        is_integer: Written without decimals, fraction or exponent.
        is_percent: Written with a percent sign.
        is_ambiguous: Written with a comma that could also part two numbers, such as `1,22`.
    """

    value: Fraction
    is_integer: bool
    is_percent: bool = False
    is_ambiguous: bool = False


def parse_number(text: str) -> Number | None:
    """Read a text that is one number, perhaps with a currency before and a unit behind; `None` if it is anything else."""
    if len(text) > _MAX_LENGTH:
        return None
    text = _simplify(text)
    if "=" in text:  # `x = 11`, or a sum such as `3 + 4 = 7`; an equation such as `2x + z = 1` is no number
        left, _, right = text.rpartition("=")
        text = right.strip() if _NAME_OR_SUM.fullmatch(left) else text
    match = _NUMBER.match(text)
    if match is None or not text or not _is_unit(text, match.end()):
        return None
    value = _value(match)
    if value is None:
        return None
    plain = match.group(10)
    comma = plain is not None and _is_decimal_comma(plain)
    integer = plain is not None and not comma and "." not in plain and match.end() == match.end(10)
    return Number(value, integer, bool(_PERCENT.match(text[match.end() :])), comma)


def numbers_equal(prediction: Number, gold: Number, tolerance: float) -> bool:
    """Whether two numbers agree: exactly if both are written as integers, within the tolerance if the gold answer is, else within
    the tolerance relative to their size.

    A percent sign on one side only is a unit (50% is 50). A predicted 50% is also right where the gold answer is 0.5, but a gold
    50% is not met by 0.5: it would then equal two different numbers.
    """
    if _close(prediction, gold, tolerance):
        return True
    if prediction.is_percent and not gold.is_percent:
        return _close(Number(prediction.value / 100, False), gold, tolerance)
    return False


def _close(prediction: Number, gold: Number, tolerance: float) -> bool:
    if prediction.is_integer and gold.is_integer:
        return prediction.value == gold.value
    scale = max(abs(prediction.value), abs(gold.value))
    # 28,800.01 is not the integer 28,800, however large the numbers are.
    return abs(prediction.value - gold.value) <= Fraction(tolerance) * (
        min(scale, Fraction(1)) if gold.is_integer else scale
    )


def _simplify(text: str) -> str:
    for old, new in _DROPPED.items():
        if old in text:
            text = text.replace(old, new)
    text = _TEXT_MACRO.sub(r" \1", text).strip().strip("$ ")
    text = re.sub(r"^([-+]?) ?[$€£¥] ?", r"\1", text)
    while len(text) > 2 and text[0] == "(" and text[-1] == ")" and "," not in text:
        text = text[1:-1].strip()
    return text.strip().rstrip(".$ ").strip() if not text.endswith("..") else text


def _is_unit(text: str, start: int) -> bool:
    """Whether nothing but a unit, or words, follows the number that ends at `start`."""
    rest = text[start:]
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    if _UNIT.fullmatch(rest.replace("$", "").rstrip(". ")) is None:
        return False
    words = re.findall(r"[A-Za-z]+", rest)
    # Letters that touch the number are a product of variables unless they are a unit or a long word.
    shortest = 4 if rest[:1].isalpha() else 3
    if any(
        len(word) < (shortest if index == 0 else 3) and word not in _SHORT_UNITS for index, word in enumerate(words)
    ):
        return False
    power = re.search(r"([A-Za-z]+)\^", rest)
    return power is None or power[1] in _LENGTHS or len(power[1]) >= shortest


def _value(match: re.Match[str]) -> Fraction | None:
    (
        sign,
        whole,
        over,
        under,
        tex_whole,
        tex_over,
        tex_under,
        short_over,
        short_under,
        plain,
        exponent_e,
        exponent_10,
    ) = match.groups()
    if plain is not None:
        exponent = int(exponent_e or exponent_10 or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        digits = plain.replace(",", ".") if _is_decimal_comma(plain) else plain.replace(",", "")
        value = Fraction(digits.replace(" ", "").rstrip(".") or "0") * Fraction(10) ** exponent
    else:
        numerator, denominator = over or tex_over or short_over, under or tex_under or short_under
        if not int(denominator):
            return None
        value = int(whole or tex_whole or 0) + Fraction(int(numerator), int(denominator))
    return -value if sign == "-" else value


def _is_decimal_comma(plain: str) -> bool:
    """`2,74` and `0,111` have a decimal comma; `1,080` and `7,425,000` separate thousands."""
    whole, comma, decimals = plain.partition(",")
    return (
        bool(comma)
        and "." not in plain
        and "," not in decimals
        and (len(decimals) != 3 or whole == "0" or len(whole) > 3)
    )
