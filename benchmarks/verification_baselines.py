r"""The verifiers that ours is compared with: math-verify alone, TRL's `accuracy_reward`, lm-eval's rules and Qwen2.5-Math's rules.

Each takes cases and returns, for each, whether the verifier takes it for right. math-verify and TRL are the installed packages with their defaults.
lm-eval (`minerva_math` for mathematics, the flexible filter of `gsm8k` for GSM8K) and Qwen2.5-Math's evaluation (`extract_answer`, `strip_string`,
`math_equal`) need another version of ANTLR than math-verify, so their rules are written anew here, as they are known, and not checked against their
source; where those would ask sympy, math-verify's reader is asked. Read their columns as an indication.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from verification_cases import Case


def math_verify_alone(cases: Sequence[Case]) -> list[bool]:
    """`verify(parse(gold), parse(output))`, math-verify's own recipe; golds without math marks are given them."""
    from math_verify import parse, verify

    return [bool(verify(parse(_as_math(case.gold)), parse(case.output))) for case in cases]


def trl_accuracy_reward(cases: Sequence[Case]) -> list[bool]:
    """TRL's reward function; a reward of `None` (unreadable gold) is not right."""
    from trl.rewards import accuracy_reward

    rewards = accuracy_reward([[{"content": case.output}] for case in cases], [_as_math(case.gold) for case in cases])
    return [reward == 1.0 for reward in rewards]


def lm_eval_rules(cases: Sequence[Case]) -> list[bool]:
    """lm-eval: `gsm8k`'s flexible filter for GSM8K, `minerva_math`'s normalization and equivalence for the rest."""
    return [_gsm8k(case) if case.group.startswith("GSM8K") else _minerva(case) for case in cases]


def qwen_rules(cases: Sequence[Case]) -> list[bool]:
    """Qwen2.5-Math's evaluation."""
    return [_qwen_equal(_qwen_extract(case.output), _qwen_strip(_gold(case.gold))) for case in cases]


def _as_math(gold: str) -> str:
    return gold if "$" in gold or "\\boxed" in gold or "\\(" in gold or "\\[" in gold else f"${gold}$"


def _gold(gold: str) -> str:
    return _last_box(gold) or gold.strip().strip("$")


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + 6, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if not depth:
            return text[start + 7 : position]
    return None


def _gsm8k(case: Case) -> bool:
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", case.output)
    last = next(filter(None, found[-1]), "") if found else "[invalid]"
    clean = [re.sub(r"\.$", "", re.sub(r",|\$|(?s:.*#### )", "", text)) for text in (last, case.gold)]
    return clean[0] == clean[1]


_MINERVA_SUBSTITUTIONS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_MINERVA_REMOVED_WORDS = (
    "square ways integers dollars mph inches ft hours km units \\ldots sue points feet minutes digits cents degrees cm gm pounds meters meals edges students childrentickets multiples "
    '\\text{s} \\text{.} \\text{\ns} \\text{}^2 \\text{}^3 \\text{\n} \\text{} \\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'
)
_MINERVA_REMOVED = _MINERVA_REMOVED_WORDS.split(" ")


def _minerva_normalize(answer: str) -> str:
    answer = answer.split("=")[-1]
    for before, after in _MINERVA_SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in _MINERVA_REMOVED:
        answer = answer.replace(expression, "")
    answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$", answer)
    answer = re.sub(r"\\(?:text|textbf|overline|boxed)\{(.*?)\}", r"\1", answer)
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    return answer.replace(",", "") if answer.replace(",", "").isdigit() else answer


def _minerva(case: Case) -> bool:
    match = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", case.output)
    answer = match[1].strip() if match else _last_box(case.output) or "[invalidanswer]"
    left, right = _minerva_normalize(answer), _minerva_normalize(_gold(case.gold))
    return left == right or _sympy_equal(left, right)


def _sympy_equal(left: str, right: str) -> bool:
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"${right}$"), parse(f"${left}$")))
    except Exception:
        return False


def _qwen_extract(output: str) -> str:
    box = _last_box(output)
    if box is not None:
        return _qwen_strip(box)
    for phrase in ("he answer is", "final answer is", "答案是"):
        if phrase in output:
            return _qwen_strip(output.rpartition(phrase)[2].strip().partition("\n")[0])
    numbers = re.findall(r"-?\d*\.?\d+", output.replace(",", ""))
    return _qwen_strip(numbers[-1]) if numbers else ""


_QWEN_REMOVED = (
    "\\left",
    "\\right",
    "\\!",
    "\\ ",
    "\\$",
    "$",
    "^{\\circ}",
    "^\\circ",
    "\\%",
    "%",
    "x\\in",
    "\\mathrm",
    "\\{",
    "\\}",
    "\\,",
)
_QWEN_UNITS = re.compile(
    r"(^|\W)(?:degrees?|cm|km|m|mph|dollars?|cents?|hours?|minutes?|feet|inches|square|units?|points|apples|meters?|miles?|percent)($|\W)"
)


def _qwen_strip(text: str) -> str:
    text = text.strip().replace("\n", "").rstrip(".").replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\\text\{(.*?)\}", r"\1", text)
    for removed in _QWEN_REMOVED:
        text = text.replace(removed, "")
    text = _QWEN_UNITS.sub(r"\1\2", text).replace(" ", "").replace("infinity", "\\infty").replace("+\\inity", "\\infty")
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    return re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)


def _qwen_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _qwen_equal(answer: str, gold: str) -> bool:
    if answer.lower() == gold.lower():
        return True
    if gold in ("A", "B", "C", "D", "E"):
        letters = re.findall(r"\b(A|B|C|D|E)\b", answer.strip("(). ").upper())
        return bool(letters) and letters[-1] == gold
    left, right = _qwen_number(answer), _qwen_number(gold)
    if left is not None and right is not None:
        return any(abs(left - value) <= 1e-4 * abs(value) for value in (right / 100, right, right * 100))
    if answer[:1] in "([" and gold[:1] in "([" and answer.strip("()[]").lower() == gold.strip("()[]").lower():
        return True
    parts = answer.strip("()[]").split(","), gold.strip("()[]").split(",")
    if len(parts[0]) == len(parts[1]) > 1 and answer[:1] in "([" and gold[:1] in "([":
        return all(_qwen_equal(a, b) for a, b in zip(*parts, strict=True))
    return bool(answer) and _sympy_equal(answer, gold)
