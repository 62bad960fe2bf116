"""Numbers as people and models write them, and when two of them are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_reasoning_distill.verification.numbers import Number, numbers_equal, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-5", -5), ("−5", -5), ("+5", 5), ("5.", 5), (".5", Fraction(1, 2)), ("007", 7),
        ("7,425,000", 7425000), ("1 000", 1000), ("1000,99", Fraction("1000.99")), ("1,22", Fraction("1.22")), ("0,111", Fraction("0.111")),
        ("$1,000.99", Fraction("1000.99")), ("1,000.99€", Fraction("1000.99")), ("-$5", -5), ("$\\$5$", 5), ("1,000.99m²", Fraction("1000.99")),
        ("10/9", Fraction(10, 9)), ("-\\frac{10}{9}", Fraction(-10, 9)), ("\\frac13", Fraction(1, 3)), ("\\dfrac{1}{2}", Fraction(1, 2)),
        ("2 1/2", Fraction(5, 2)), ("2\\frac{1}{2}", Fraction(5, 2)), ("-2 1/2", Fraction(-5, 2)),
        ("3.5e4", 35000), ("3.5 \\times 10^{4}", 35000), ("2×10^-2", Fraction(1, 50)),
        ("28\\%", 28), ("28 percent", 28), ("90^\\circ", 90), ("90°", 90), ("90 degrees", 90), ("125\\textnormal{ miles}", 125),
        ("15\\mbox{ cm}^2", 15), ("5 km/h", 5), ("30 miles per hour", 30), ("x=11", 11), ("3 + 4 = 7", 7), ("11,\\! 111,\\! 100", 11111100), ("{,}5", None),
        ("5 ft", 5), ("5mph", 5), ("15 m^2", 15), ("3 sq ft", 3), ("5 apples", 5), ("20°C", 20), ("12 in^3", 12), ("5th", 5), ("3 m/s", 3),
        ("5r^5", None), ("3R^2", None), ("2xy", None), ("2 xy", None), ("3abc", None), ("5i", None), ("4 g^2", None), ("7k", None),
        ("3x", None), ("2\\pi", None), ("(9+1)", None), ("204_5", None), ("1e99999", None), ("1/0", None), ("", None), ("$", None), ("five", None),
        ("32, 349", None), ("1,2,3", None), ("3:4", None), ("5 hours and 3 minutes", None), ("1\\sqrt{19}", None), ("2x+z=1", None), ("x<5", None),
        ("1" * 300, None), ("--5", None), ("1-2", None),
    ],
)  # fmt: skip
def test_parse(text: str, value: Fraction | int | None) -> None:
    number = parse_number(text)
    assert (number.value if number else None) == value


@pytest.mark.parametrize(
    ("prediction", "gold", "equal"),
    [
        ("18", "18.00", True), ("18", "19", False), ("10000000", "10000001", False), ("0.3333333", "1/3", True), ("0.33", "1/3", False),
        ("50%", "50", True), ("50", "50%", True), ("50%", "0.5", True), ("0.5", "50%", False), ("50%", "50%", True), ("0", "0.0", True),
    ],
)  # fmt: skip
def test_equality(prediction: str, gold: str, equal: bool) -> None:
    one, other = parse_number(prediction), parse_number(gold)
    assert one is not None
    assert other is not None
    assert numbers_equal(one, other, 1e-6) is equal


def test_how_it_was_written() -> None:
    assert parse_number("1,080") == Number(Fraction(1080), True)
    assert parse_number("1,22") == Number(Fraction("1.22"), False, is_ambiguous=True)
    assert parse_number("28\\%") == Number(Fraction(28), True, is_percent=True)
    assert parse_number("1.0") == Number(Fraction(1), False)


@given(st.integers(-(10**30), 10**30))
def test_every_integer_reads_back_with_and_without_separators(value: int) -> None:
    for text in (str(value), f"{value:,}"):
        number = parse_number(text)
        assert number is not None
        assert (number.value, number.is_integer) == (value, True)


@given(st.text(max_size=40))
def test_never_raises(text: str) -> None:
    parse_number(text)
