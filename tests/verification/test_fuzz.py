"""Random texts, half mathematics and half rubbish: every one gets a verdict, in order, and the right answers between them stay right."""

from __future__ import annotations

import random
import re
import time

import pytest

from trl_reasoning_distill.verification.extract import extract_answer, unescaped
from trl_reasoning_distill.verification.verify import verify_answers

PIECES = [
    "\\frac{", "\\sqrt{", "\\boxed{", "\\text{", "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "\\{", "\\}", "{", "}", "(", ")", "[", "]", "$", "$$", "\\(", "\\)", "&", "\\\\",
    "1", "2", "-3", "0.5", "1,234", "10^{6}", "\\pi", "e", "i", "x", "y", "+", "-", "\\cdot ", "/", "=", "<", "\\le ", "\\in ", "\\cup ", "\\infty", ",", ";", ":", "^", "_", "^{", "_{", "!", "%", "\\%", "°",
    "\\sin ", "\\log ", "\\pm ", "\\int ", "\\sum_{i=1}^{", "\\lim ", " and ", " or ", "even", "cm", "\\$", "####", "\n", "\n\n", " ", "Answer: ", "the answer is ", "Final Answer: ", "Therefore ", "Wait ", "<think>", "</think>",
    "(A)", "B.", "\x00", "\u202e", "½", "四", "🧮", "\ud800", "'", '"', "`", "*", "**", "~", "#", "\\mathbb{R}", "\\emptyset", "\\neq ", "\\overline{", "\\binom{", "|",
]  # fmt: skip
SENTINEL_EVERY = 10


def make_text(rng: random.Random) -> str:
    if rng.random() < 0.05:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x11000)))) for _ in range(rng.randrange(40))
        )
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 14)))


def make_pairs(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Outputs and gold answers; every tenth is right, and needs algebra."""
    rng = random.Random(seed)
    outputs, golds = [], []
    for number in range(count):
        if number % SENTINEL_EVERY == 0:
            outputs.append(f"\\boxed{{\\sqrt{{{2 * (number % 9 + 2) ** 2}}}}}")
            golds.append(f"{number % 9 + 2}\\sqrt{{2}}")
        else:
            outputs.append(make_text(rng))
            golds.append(
                make_text(rng) if rng.random() < 0.5 else rng.choice(("42", "\\frac{1}{2}", "x^2+1", "(1,2]", "even"))
            )
    return outputs, golds


@pytest.mark.parametrize(
    "count", [1000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["1e3", "1e5"]
)
def test_every_text_gets_its_verdict(count: int) -> None:
    outputs, golds = make_pairs(count, seed=count)
    verdicts = []
    for start in range(0, count, 5000):
        verdicts += verify_answers(outputs[start : start + 5000], golds[start : start + 5000], num_workers=2)
    assert len(verdicts) == count
    assert {verdict.status for verdict in verdicts[::SENTINEL_EVERY]} == {"correct"}
    assert {verdict.status for verdict in verdicts} <= {"correct", "incorrect", "undecided"}
    assert all(verdict.reason for verdict in verdicts)
    right = sum(v.status == "correct" for i, v in enumerate(verdicts) if i % SENTINEL_EVERY)
    assert right < 0.03 * count, "rubbish is seldom right"


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["3e3", "1e5"])
def test_extraction_is_quick_and_finds_only_what_is_there(count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        text = "".join(make_text(rng) for _ in range(4))
        start = time.process_time()
        found = extract_answer(text)
        assert time.process_time() - start < 1.0, text
        assert (found.answer is None) == (found.rule in ("none", "unfinished_reasoning"))
        parts = re.split(r"[,;] ", found.answer or "")  # several candidates side by side are returned together
        assert found.answer is None or found.answer in unescaped(text) or all(part in unescaped(text) for part in parts)
