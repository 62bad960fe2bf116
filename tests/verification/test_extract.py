"""`extract_answer`: the last commitment after the reasoning, by the rule that is named, in linear time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.verification.extract import ExtractedAnswer, committed_text, extract_answer, math_segments


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        ("48/2=24\n#### 24", "24", "hash"),
        ("#### 1,080 dollars", "1,080 dollars", "hash"),
        ("#### Step 1: add\n3+4=7\n#### 2. Double\nThe answer is 14.", "14", "answer_is"),
        ("#### Conclusion\nShe has 42 apples left in the end.", "42", "last_number"),
        ("#### Paris", "Paris", "hash"),
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "boxed"),
        ("first \\boxed{1}. Then the sum of it all is \\boxed{2}", "2", "boxed"),
        ("\\boxed{1} and \\boxed{2}", "1, 2", "boxed"),
        ("\\boxed{(3,3)} \\text{ for part (a) and } \\boxed{(1,1)}", "(3,3), (1,1)", "boxed"),
        ("\\boxed{4}, that is \\boxed{4}", "4", "boxed"),
        ("\\boxed{a\\boxed{b}}", "a\\boxed{b}", "boxed"),
        ("\\boxed{7} and then \\boxed{", "7", "boxed"),
        ("**Final Answer:** 7", "7", "final_answer"),
        ("**Final Answer**\n\n\\boxed{840}", "840", "boxed"),
        ("Final answer:\n42 apples\n", "42 apples", "final_answer"),
        ("Final Answer: The final answer is $(-6,10)$. I hope it is correct.", "$(-6,10)$", "final_answer"),
        ("The answer is 3.5. That was easy.", "3.5", "answer_is"),
        ("Answer: C", "C", "answer_is"),
        ("He gets 3*4=12.\nA: 12", "12", "answer_is"),
        ("\\boxed{41} no: the answer is 42", "42", "answer_is"),
        ("The answer is 41, so \\boxed{42}", "42", "boxed"),
        ("42", "42", "whole"),
        ("28 percent", "28 percent", "whole"),
        ("Evelyn.", "Evelyn", "whole"),
        ("We add the two to get a sum. Therefore, she has 12 apples left.", "12", "therefore"),
        ("We look at it from all sides. Thus $x \\geq 5$ is what we get here.", "x \\geq 5", "therefore"),
        ("Let us look at the matrix, which is $M$ and then \\(N\\) as we know", "N", "math"),
        ("She paid $5 and then $3, so it was $8 in all for her.", "$8", "last_number"),
        ("so the number is 10 which is 1,000.99m² for all", "1,000.99", "last_number"),
        ("it went up, all in all, by 20 percent this year", "20 percent", "last_number"),
        ("the probability that she wins is 2/3, as we have seen", "2/3", "last_number"),
        ("I do not know how to solve such a problem", None, "none"),
        ("", None, "none"),
    ],
)
def test_rules(text: str, answer: str | None, rule: str) -> None:
    assert extract_answer(text) == ExtractedAnswer(answer, rule)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\\boxed{37}</think> I give up on this one", None),
        ("<think>\\boxed{37}</think>\n\n40", "40"),
        ("<think>the answer is 37", None),
        ("<think>37</think>40<think>hm, 41", None),
        ("the template opened the tag: 37</think>40", "40"),
        ("<|begin_of_thought|>37<|end_of_thought|><|begin_of_solution|>so \\boxed{40}<|end_of_solution|>", "40"),
    ],
)
def test_only_what_follows_the_reasoning_counts(text: str, answer: str | None) -> None:
    assert extract_answer(text).answer == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{37}. Wait… 40", "40"),
        ("#### 37\nWait, that's wrong. It must be 40 instead.", "40"),
        ("\\boxed{37}. Wait, let me check it once more. Yes.", "37"),
        ("\\boxed{37}. Actually that is a nice number, 1 of 2 primes", "37"),
        ("Wait, the answer is 36. No, the answer is 37", "37"),
    ],
)
def test_an_answer_that_is_taken_back_does_not_count(text: str, answer: str) -> None:
    assert extract_answer(text).answer == answer


def test_math_segments_leave_money_alone() -> None:
    def contents(text: str) -> list[str]:
        return [content for _, _, content in math_segments(text)]

    assert contents("$5 + $3 = $8") == []
    assert contents("between $5-$3") == []
    assert contents("$x$, $$y$$, \\(z\\), \\[w\\] and \\$5") == ["x", "y", "z", "w"]
    assert contents("it costs $5, so $x=5$.") == ["x=5"]


def test_committed_text() -> None:
    assert committed_text("a") == "a"
    assert committed_text("<think>a</think>b") == "b"
    assert committed_text("<think>a") is None


BITS = st.sampled_from(
    ["<think>", "</think>", "\\boxed{", "}", "{", "$", "$$", "\\(", "\\)", "####", "\n", " ", "7", "1,000", "-", "/", ".", "answer is", "Final Answer:", "Wait", "therefore", "%", "\\"]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(BITS, max_size=20).map("".join)))
def test_never_raises_and_never_makes_up_an_answer(text: str) -> None:
    found = extract_answer(text)
    assert (found.answer is None) == (found.rule in ("none", "unfinished_reasoning"))
    assert found.answer is None or found.answer


@pytest.mark.parametrize(
    "bit",
    ["\\boxed{", "\\boxed{}", "{", "}", "$", "$x$ ", "\\(", "#", "####", "#### 1\n", "answer is ", "the answer is 1\n", "A: ", "Therefore ", "1", "1,", "1 ", "-", "/1", "Wait ", "<think>", "</think>", " ", "\n", "*", "1.", "\\boxed{1}, "],
)  # fmt: skip
@pytest.mark.timeout(120)  # quadratic time would take days
def test_hostile_text_hangs_nothing(bit: str) -> None:
    found = extract_answer(bit * (1_000_000 // len(bit)))
    assert (found.answer is None) == (found.rule in ("none", "unfinished_reasoning"))
