"""Every kind of answer: what counts as the same, and what does not. One table for each."""

from __future__ import annotations

import pytest

from trl_reasoning_distill.verification.verify import verify_answer, verify_answers

# kind: (gold, right answers, wrong answers)
KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "integer": ("42", ["42", "42.0", "042", "+42", "x = 42", "40 + 2 = 42", "42."], ["43", "4.2", "-42", "42.5", "420"]),
    "unit": ("15\\mbox{ cm}^2", ["15", "15 cm^2", "15 \\text{ square centimetres}", "15 cm²"], ["16 cm^2", "15.5"]),
    "unit per unit": ("60 km/h", ["60", "60 km/h", "60 kilometers per hour", "1 km/min"], ["16 m/s", "60 m/s", "60 km"]),
    "percent": ("28\\%", ["28%", "28", "28 percent", "28.0 \\%", "28 pct", "0.28", "7/25"], ["2.8%", "29%", "2800"]),
    "share": ("0.5", ["50%", ".5", "\\frac12", "1/2"], ["5%", "0.05", "50"]),
    "currency": ("\\$1,080.50", ["1080.50", "$1,080.5", "1080.5 dollars", "\\$1080.50", "108050 cents"], ["1,080", "108050", "€1080.50"]),
    "thousands": ("7425000", ["7,425,000", "7 425 000", "7{,}425{,}000", "7,\\!425,\\!000", "7425000.0"], ["7,425", "74,250,00"]),
    "decimal comma": ("2.74", ["2,74", "2.740"], ["274", "2,47"]),
    "fraction": ("\\frac{3}{4}", ["3/4", "0.75", "\\dfrac{3}{4}", "\\frac34", "\\tfrac{6}{8}", "75%"], ["\\frac{4}{3}", "0.74", "3", "-3/4"]),
    "negative fraction": ("-\\frac{2}{3}", ["\\frac{-2}{3}", "-2/3", "-0.66666667"], ["\\frac{2}{3}", "-0.67"]),
    "mixed number": ("2\\frac{1}{2}", ["2 1/2", "5/2", "2.5", "\\frac{5}{2}"], ["2", "1/2", "21/2"]),
    "scientific": ("6.72 \\times 10^{-5}", ["0.0000672", "6.72e-5", "6.72 × 10^-5", ".0000672", "67.2 \\cdot 10^{-6}"], ["6.72 \\times 10^{5}", "6.72"]),
    "degrees": ("90^\\circ", ["90", "90°", "90 degrees", "90^{\\circ}", "90 \\text{ degrees}"], ["91^\\circ", "9"]),
    "base": ("52_8", ["52_{8}", "52", "52_8"], ["52_9", "42", "53_8"]),
    "interval": ("\\left( 2, 5 \\right]", ["(2,5]", "(2, 5.0]", "\\left(2,\\,5\\right]"], ["(2,5)", "[2,5]", "(5,2]", "(2,6]"]),
    "infinite interval": ("(-\\infty, 0]", ["(-\\infty,0]", "\\left(-\\infty, 0\\right]"], ["(-\\infty, 1]", "(-\\infty, 0)"]),
    "union": ("(0,9) \\cup (9,36)", ["(0,9)\\cup(9,36)", "(9, 36) \\cup (0, 9)"], ["(0,36)", "(0,9) \\cup (9,37)"]),
    "tuple": ("(3, -13)", ["(3,-13)", "\\left( 3, -13 \\right)", "(3.0, -13)"], ["(-13, 3)", "(3, 13)", "(3,-13,0)"]),
    "list": ("1, -2", ["-2, 1", "1 and -2", "\\{1,-2\\}", "-2 \\text{ and } 1"], ["1", "1, 2", "1,-2,3", "1,-2,1"]),
    "set": ("\\{1, 2, 3\\}", ["\\{3,2,1\\}", "1, 2, 3", "\\left\\{1,2,3\\right\\}"], ["\\{1,2\\}", "\\{1,2,4\\}"]),
    "points": ("(1,2), (3,4)", ["(3,4), (1,2)", "(1,2) and (3,4)"], ["(2,1), (3,4)", "(1,2)"]),
    "matrix": (
        "\\begin{pmatrix} 1 & 1/2 \\\\ 0 & -3 \\end{pmatrix}",
        ["\\begin{bmatrix}1&0.5\\\\0&-3\\end{bmatrix}", "\\begin{pmatrix} 1 & \\frac12 \\\\ 0 & -3 \\\\ \\end{pmatrix}"],
        ["\\begin{pmatrix} 1 & 0 \\\\ 1/2 & -3 \\end{pmatrix}", "\\begin{pmatrix} 1 & 1/2 \\end{pmatrix}"],
    ),
    "word": ("\\text{even}", ["even", "Even", "\\textbf{even}", "\"even\"", "an even"], ["odd", "never", "neve", "uneven"]),
    "name": ("Evelyn", ["\\text{Evelyn}", "evelyn"], ["Evelin", "Angela", "Navin"]),
    "multiple choice": ("\\text{(C)}", ["C", "(C)", "\\text{C}", "C. 12 apples", "(C) 12", "c"], ["D", "(A)", "\\text{(B)}"]),
}  # fmt: skip

ALGEBRA: dict[str, tuple[str, list[str], list[str]]] = {
    "root": ("2\\sqrt{2}", ["\\sqrt{8}", "\\sqrt 8", "\\frac{4}{\\sqrt2}"], ["\\sqrt{2}", "2.8"]),
    "monomial": ("5r^5", ["5 r^{5}", "r^5 \\cdot 5"], ["5r^6", "5w^5", "5"]),
    "product": ("2xy", ["2yx", "xy + xy"], ["2ab", "2", "3xy"]),
    "polynomial": ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^{2}", "x(x+2)+1"], ["x^2+2x", "y^2+2y+1"]),
    "equation": ("2x + 4y = 3", ["4y + 2x - 3 = 0", "y = -\\frac{1}{2}x + \\frac{3}{4}"], ["2x + 4y = 4"]),
    "inequality": ("x \\ge 5", ["5 \\le x", "x \\geq 5"], ["x > 5", "x \\le 5"]),
    "trigonometric": ("\\sec^2 y", ["\\tan^2(y)+1"], ["\\tan^2(y)-1"]),
    "complex": ("3-4i", ["-4i+3"], ["3+4i"]),
    "sign of a sum": ("1 \\pm \\sqrt{19}", ["1+\\sqrt{19}, 1-\\sqrt{19}"], ["1+\\sqrt{19}"]),
}  # fmt: skip

PHRASES = [
    "\\boxed{%s}",
    "We are done.\n\nFinal Answer: $%s$",
    "The answer is $%s$.",
    "<think>\n\\boxed{7}\n</think>\n\n**Answer:** %s",
]


def cases(kinds: dict[str, tuple[str, list[str], list[str]]]) -> list[tuple[str, str, str, bool]]:
    return [
        (PHRASES[number % len(PHRASES)] % answer, gold, kind, expected)
        for kind, (gold, right, wrong) in kinds.items()
        for expected, answers in ((True, right), (False, wrong))
        for number, answer in enumerate(answers)
    ]


def test_kinds() -> None:
    rows = cases(KINDS)
    verdicts = verify_answers([row[0] for row in rows], [row[1] for row in rows], timeout=10.0)
    wrong = [
        (row, v) for row, v in zip(rows, verdicts, strict=True) if v.status != ("correct" if row[3] else "incorrect")
    ]
    assert not wrong
    with_algebra = {row[2] for row, verdict in zip(rows, verdicts, strict=True) if verdict.method == "symbolic"}
    assert not {row[2] for row, v in zip(rows, verdicts, strict=True) if row[3] and v.method == "symbolic"}
    assert with_algebra <= {
        "thousands",
        "decimal comma",
        "interval",
        "infinite interval",
        "union",
        "list",
        "points",
        "matrix",
    }


def test_kinds_with_algebra() -> None:
    rows = cases(ALGEBRA)
    verdicts = verify_answers([row[0] for row in rows], [row[1] for row in rows], timeout=10.0)
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if (v.status == "correct") != row[3]]
    assert not wrong
    assert {verdict.method for verdict in verdicts} <= {"symbolic", "exact"}


def test_a_near_miss_is_reported_and_counts_only_if_asked() -> None:
    reported = verify_answer("Answer: Evelin", "Evelyn")
    assert (reported.status, reported.method) == ("incorrect", "fuzzy")
    assert "83 of 100" in reported.reason
    asked = verify_answer("Answer: Evelin", "Evelyn", fuzzy=80)
    assert (asked.status, asked.method) == ("correct", "fuzzy")
    assert verify_answer("Answer: Evelin", "Evelyn", fuzzy=90).status == "incorrect"
    assert verify_answer("Answer: 43", "42", fuzzy=10).status == "incorrect", "numbers never resemble"
    with pytest.raises(ValueError, match="fuzzy"):
        verify_answer("a", "b", fuzzy=101)


def test_the_tolerance_is_the_callers() -> None:
    assert verify_answer("0.333", "1/3").status == "incorrect"
    assert verify_answer("0.333", "1/3", tolerance=1e-2).status == "correct"
    assert verify_answer("28800.01", "28800").status == "incorrect", "an integer is not met by a number beside it"
    assert verify_answer("28800.01", "28800.0").status == "correct"
    assert verify_answer("\\boxed{(0.33, 2)}", "(\\frac13, 2)", tolerance=2e-2).status == "correct"
