r"""Labelled pairs for `benchmarks/verification.py`: real ones from files, and MATH's answers rewritten (still right) or changed (wrong).

A rewrite keeps the value and changes the writing (`\frac{1}{2}` → `0.5`, `1,-2` → `-2, 1`); a change makes it wrong (another digit, a
missing element, another bracket). Both are textual rules written without regard to how the verifier reads, and each result stands in
one of `WRAPPERS`: a real solution, a phrase, a box, or after a thought that holds the other answer. Problems with an even number were
looked at while the verifier's rules were written (`development`); those with an odd number were not (`held-out`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A model's output, the gold answer, whether it is right, and where it comes from."""

    group: str
    kind: str
    output: str
    gold: str
    expected: bool


Rule = Callable[[str], str | None]

_INTEGER = re.compile(r"-?\d+")
_PLAIN_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_DEGREES = re.compile(r"(\d+)\^\\circ")
_TEXT = re.compile(r"\\text\{\(?([A-Za-z]+)\)?\}")
_LIST = re.compile(r"[^()\[\]{}\\]+(?:,[^()\[\]{}\\]+)+")
_PAIR = re.compile(r"\(([^(),]+),([^(),]+)\)")
_ROOT = re.compile(r"(-?)(\d+) ?\\sqrt\{?(\d+)\}?")


def load_cases(data: Path, further: Path | None = None) -> list[Case]:
    """All groups of cases; `further` is a JSONL file of (gold, pred, expected) rows that no rule was tuned on."""
    cases = [
        Case("GSM8K outputs", row["model"], row["response"], row["gold"], row["published_correct"])
        for row in read_rows(data / "model_outputs" / "openai_gpt3_gsm8k.jsonl")
    ]
    cases += [
        Case("equivalence cases", row["source"].partition("::")[2], row["pred"], row["gold"], row["expected"])
        for row in read_rows(data / "equivalence_cases" / "math_verify.jsonl")
    ]
    cases += [
        Case("GSM8K solutions", "gsm8k", row["answer"], row["answer"].rpartition("####")[2].strip(), True)
        for row in read_rows(data / "gsm8k" / "test.jsonl")
    ]
    for path in sorted((data / "answers").glob("*.jsonl")):
        cases += [
            Case("reported answers", row["kind"], row["output"], row["gold"], row["expected"] == "correct")
            for row in read_rows(path)
        ]
    for index, row in enumerate(read_rows(data / "math" / "math500.jsonl")):
        cases += math_cases(row, index)
    cases += random_cases()
    for row in read_rows(further) if further else ():
        output = row["pred"] if "$" in row["pred"] else f"\\boxed{{{row['pred']}}}"
        cases.append(Case("further cases", row["source"], output, row["gold"], row["expected"]))
    return cases


def random_cases(per_kind: int = 20) -> Iterator[Case]:
    """Random answers of every type, from the generators of the tests: the same value, another value, and reward hacks."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.verification.test_properties import KINDS, boxed, hacks, pairs

    for kind in KINDS:
        for equal in (True, False):
            group = "random writings" if equal else "random other values"
            yield from (
                Case(group, kind, boxed(answer), gold, equal) for gold, answer in pairs(kind, per_kind, 3, equal=equal)
            )
    yield from (Case("reward hacks", "hack", output, gold, False) for output, gold in hacks(per_kind=1))


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def math_cases(row: dict, index: int) -> Iterator[Case]:
    """The rewritten and the changed answers of one problem of MATH, each in one of the wrappers."""
    gold, half = row["answer"], "held-out" if index % 2 else "development"
    number = index
    for expected, rules in ((True, REWRITES), (False, CHANGES)):
        for name, rule in rules.items():
            answer = rule(gold)
            if answer is None or (name != "as it is" and answer == gold):
                continue
            number += 1
            output = wrap(answer, gold, row["solution"], number)
            yield Case(f"MATH {'rewritten' if expected else 'changed'}, {half}", name, output, gold, expected)


def wrap(answer: str, gold: str, solution: str, number: int) -> str:
    """An output that commits to `answer`; which wrapper is decided by `number`."""
    box = f"\\boxed{{{gold}}}"
    match number % 5:
        case 0 if box in solution:
            return solution.replace(box, f"\\boxed{{{answer}}}")
        case 1:
            return f"Final Answer: The final answer is ${answer}$. I hope it is correct."
        case 2:
            return f"<think>\nLet me see. It could be {box}.\n</think>\n\nSo the answer is \\boxed{{{answer}}}."
        case 3:
            return f"We have done all the steps above and checked them.\n\n**Answer:** ${answer}$"
        case _:
            return f"We do all of it step by step, and at the end find $$\\boxed{{{answer}}}$$"


def _when(pattern: re.Pattern[str], write: Callable[[re.Match[str]], str | None]) -> Rule:
    """A rule for golds that are a match of `pattern` and nothing else."""

    def rule(gold: str) -> str | None:
        match = pattern.fullmatch(gold)
        return write(match) if match else None

    return rule


def _replace(*changes: tuple[str, str]) -> Rule:
    def rule(gold: str) -> str | None:
        answer = gold
        for old, new in changes:
            answer = answer.replace(old, new)
        return answer if answer != gold else None

    return rule


def _decimal(match: re.Match[str]) -> str | None:
    value = Fraction(int(match[2]), int(match[3]))
    places = next((n for n in range(1, 7) if (value * 10**n).denominator == 1), None)
    return None if places is None else f"{match[1]}{float(value):.{places}f}"


def _mixed(match: re.Match[str]) -> str | None:
    whole, rest = divmod(int(match[2]), int(match[3]))
    return f"{match[1]}{whole}\\frac{{{rest}}}{{{match[3]}}}" if whole and rest else None


def _thousands(separator: str) -> Rule:
    return _when(_INTEGER, lambda m: f"{int(m[0]):,}".replace(",", separator) if abs(int(m[0])) >= 1000 else None)


def _scientific(match: re.Match[str]) -> str | None:
    digits = match[0].rstrip("0")
    zeros = len(match[0]) - len(digits)
    return f"{digits} \\times 10^{{{zeros}}}" if zeros >= 2 else None


def _terms(gold: str) -> list[str] | None:
    """The terms of a sum such as `x^3+3x-6`, each with its sign; `None` if it is anything else."""
    text = gold.replace(" ", "")
    if re.search(r"[=,()<>|\[\]]|\\(?:pm|cup|in|text|mbox|begin|left|infty)", text):
        return None
    terms, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character in "+-" and position > start and not depth:
            terms.append(text[start:position])
            start = position
    terms.append(text[start:])
    return terms if len(terms) > 1 else None


def _reverse_sum(gold: str) -> str | None:
    terms = _terms(gold)
    if terms is None:
        return None
    return "".join(term if term[0] in "+-" else f"+{term}" for term in reversed(terms)).removeprefix("+")


def _plus_minus(gold: str) -> str | None:
    if "\\pm" not in gold or gold[1:2] == "{":
        return None
    return f"{gold.replace(chr(92) + 'pm', '+')}, {gold.replace(chr(92) + 'pm', '-')}"


def _is_number(gold: str) -> bool:
    return bool(_INTEGER.fullmatch(gold) or _PLAIN_FRACTION.fullmatch(gold) or re.fullmatch(r"-?\d*\.\d+", gold))


REWRITES: dict[str, Rule] = {
    "as it is": lambda gold: gold,
    "\\dfrac": _replace(("\\frac", "\\dfrac")),
    "\\tfrac": _replace(("\\frac", "\\tfrac")),
    "a/b": _when(_PLAIN_FRACTION, lambda m: f"{m[1]}{m[2]}/{m[3]}"),
    "fraction as decimal": _when(_PLAIN_FRACTION, _decimal),
    "mixed number": _when(_PLAIN_FRACTION, _mixed),
    "sign in the numerator": _when(_PLAIN_FRACTION, lambda m: f"\\frac{{-{m[2]}}}{{{m[3]}}}" if m[1] else None),
    "not in lowest terms": _when(_PLAIN_FRACTION, lambda m: f"{m[1]}\\frac{{{3 * int(m[2])}}}{{{3 * int(m[3])}}}"),
    "trailing zeros": _when(_INTEGER, lambda m: f"{m[0]}.00"),
    "1,234": _thousands(","),
    "1{,}234": _thousands("{,}"),
    "1\\,234": _thousands("\\,"),
    "scientific": _when(_INTEGER, _scientific),
    "unit in \\text": _when(_INTEGER, lambda m: f"{m[0]} \\text{{ cm}}"),
    "unit as a word": _when(_INTEGER, lambda m: f"{m[0]} units"),
    "currency": _when(_INTEGER, lambda m: f"\\${m[0]}" if int(m[0]) > 0 else None),
    "percent": _when(_INTEGER, lambda m: f"{m[0]}\\%" if int(m[0]) > 0 else None),
    "equation": lambda gold: f"x = {gold}" if _is_number(gold) else None,
    "degrees left out": _when(_DEGREES, lambda m: m[1]),
    "degrees as a word": _when(_DEGREES, lambda m: f"{m[1]} \\text{{ degrees}}"),
    "degrees as °": _when(_DEGREES, lambda m: f"{m[1]}°"),
    "text as a word": _when(_TEXT, lambda m: m[1]),
    "text in lower case": _when(_TEXT, lambda m: f"\\text{{{m[1].lower()}}}" if len(m[1]) > 1 else None),
    "choice in parentheses": _when(_TEXT, lambda m: f"({m[1]})" if len(m[1]) == 1 else None),
    "\\left \\right": lambda g: None if "\\left" in g else _replace(("(", "\\left("), (")", "\\right)"))(g),
    "no \\left": _replace(("\\left", ""), ("\\right", "")),
    "thin spaces": _replace((",", ",\\,")),
    "no spaces": lambda g: None if re.search(r"\\[a-z]+ [A-Za-z0-9]|\d \\?\w|mbox|text", g) else _replace((" ", ""))(g),
    "braced exponents": lambda gold: re.sub(r"\^(\d)(?!\d)", r"^{\1}", gold),
    "braced base": lambda gold: re.sub(r"_(\d)$", r"_{\1}", gold),
    "sum in another order": _reverse_sum,
    "list in another order": _when(_LIST, lambda m: ", ".join(reversed(m[0].replace(" ", "").split(",")))),
    "list as a set": _when(_LIST, lambda m: f"\\{{{m[0]}\\}}"),
    "root": _when(_ROOT, lambda m: f"{m[1]}\\sqrt{{{int(m[2]) ** 2 * int(m[3])}}}"),
    "\\cdot": _when(_ROOT, lambda m: f"{m[1]}{m[2]} \\cdot \\sqrt{{{m[3]}}}"),
    "multiples of π": lambda gold: re.sub(r"^(\d+) ?\\pi$", r"\\pi \\cdot \1", gold),
    "π/6": lambda gold: re.sub(r"^(-?)\\frac\{\\pi\}\{(\d+)\}$", r"\1\\pi/\2", gold),
    "\\bmatrix": _replace(("pmatrix", "bmatrix")),
    "matrix with \\frac": lambda gold: re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", gold) if "matrix" in gold else None,
    "±": _plus_minus,
    "+∞": _replace((",\\infty", ", +\\infty"), (", \\infty", ", +\\infty")),
}  # fmt: skip


def _next_digit(gold: str) -> str | None:
    """The last number of an expression, one more."""
    found = list(re.finditer(r"\d+", gold))
    if not found or re.search(r"\d\.\d|\\text\{\(", gold):
        return None
    last = found[-1]
    return gold[: last.start()] + str(int(last[0]) + 1) + gold[last.end() :]


def _drop_last(gold: str) -> str | None:
    return gold.rpartition(",")[0] if _LIST.fullmatch(gold) else None


def _rename(gold: str) -> str | None:
    """Another variable, in an expression with just one."""
    letters = set(re.findall(r"(?<![\\A-Za-z])[a-z](?![a-z])", re.sub(r"\\[a-z]+", "\\\\", gold)))
    return re.sub(r"(?<![\\A-Za-z])[a-hj-z](?![A-Za-z])", "w", gold) if len(letters - {"i"}) == 1 and "=" not in gold and "in" not in gold else None  # fmt: skip


def _other_bracket(gold: str) -> str | None:
    if not re.search(r"\(.*\]|\[.*\)|\\infty", gold) or "matrix" in gold:
        return None
    return gold.replace("(", "[", 1) if "(-\\infty" not in gold else gold.replace("]", ")", 1).replace("2)", "2]", 1)


CHANGES: dict[str, Rule] = {
    "one more": _when(_INTEGER, lambda m: str(int(m[0]) + 1)),
    "one less": _when(_INTEGER, lambda m: str(int(m[0]) - 1)),
    "ten times": _when(_INTEGER, lambda m: f"{m[0]}0" if int(m[0]) else None),
    "a hundredth": _when(_INTEGER, lambda m: f"{int(m[0]) / 100:.4f}" if int(m[0]) else None),
    "a little more": _when(_INTEGER, lambda m: f"{m[0]}.01"),
    "other sign": lambda gold: (gold.removeprefix("-") if gold[0] == "-" else f"-{gold}") if _is_number(gold) and gold.strip("-0.") else None,
    "negated": lambda gold: f"-({gold})" if _terms(gold) or _ROOT.fullmatch(gold) else None,
    "upside down": _when(_PLAIN_FRACTION, lambda m: f"{m[1]}\\frac{{{m[3]}}}{{{m[2]}}}"),
    "numerator alone": _when(_PLAIN_FRACTION, lambda m: m[1] + m[2] if m[3] != "1" else None),
    "rounded": _when(_PLAIN_FRACTION, lambda m: f"{m[1]}{int(m[2]) / int(m[3]):.2f}" if 100 * int(m[2]) % int(m[3]) else None),
    "next digit": _next_digit,
    "element missing": _drop_last,
    "element more": _when(_LIST, lambda m: f"{m[0]}, 99"),
    "coordinates swapped": _when(_PAIR, lambda m: f"({m[2].strip()}, {m[1].strip()})" if m[1].strip() != m[2].strip() else None),
    "other bracket": _other_bracket,
    "other variable": _rename,
    "other word": _when(_TEXT, lambda m: "\\text{other}" if len(m[1]) > 1 else None),
    "other choice": _when(_TEXT, lambda m: f"\\text{{({chr(ord(m[1]) % 5 + 65)})}}" if len(m[1]) == 1 and chr(ord(m[1]) % 5 + 65) != m[1] else None),
    "term missing": lambda gold: "".join((_terms(gold) or [])[:-1]) or None,
    "root left out": _when(_ROOT, lambda m: m[1] + m[2] + m[3]),
}  # fmt: skip
