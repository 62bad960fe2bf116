"""Where a completion ends: before a question of the model's own, and nowhere that it is still answering the one it was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.data.formatting import PRESETS, ReasoningFormat
from trl_reasoning_distill.teacher.sampling import GenerationOutput
from trl_reasoning_distill.teacher.sampling.stopping import end_completion


def ended(text: str, form: str | None = "gsm8k", reason: str = "stop", stop: tuple[str, ...] | None = None) -> Any:
    response_format = ReasoningFormat.preset(form) if form else None
    return end_completion(GenerationOutput(text, reason, 9, 3, 0.0), response_format, stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "text", "kept"),
    [
        ("gsm8k", "2+3=5\n#### 5\n\nQuestion: Tom has 7 apples.\nAnswer: 3+4=7\n#### 7", "2+3=5\n#### 5"),
        ("gsm8k", "2+3=5\n#### 5\n\nTom has 7 apples. How many?\n\n3+4=7\n#### 7", "2+3=5\n#### 5"),
        ("gsm8k", "2+3=5\n#### 5<|im_end|>\n<|im_start|>user\nTom?", "2+3=5\n#### 5"),
        ("think", "<think>\n2+3=5\n</think>\n\n5\n\nQ: Tom has 7 apples.\nA: 7", "<think>\n2+3=5\n</think>\n\n5"),
        ("think", "<think>\n2+3=5\n</think>\n\n5</s>junk 7", "<think>\n2+3=5\n</think>\n\n5"),
        ("boxed", "So\n\n\\boxed{5}\n\nTom has 7.\n\n\\boxed{7}", "So\n\n\\boxed{5}"),
        ("boxed", "So it is $\\boxed{5}$.\n\n## Problem 2: Tom?\n$\\boxed{7}$", "So it is $\\boxed{5}$."),
        ("final_answer", "So\n\nFinal Answer: 5\n\nTom has 7.\n\nFinal Answer: 7", "So\n\nFinal Answer: 5"),
        ("plain", "2+3=5 apples.\n\nQuestion: Tom has 7 apples.", "2+3=5 apples."),
        ("plain", "5\nQuestion: Tom has 7 apples.", "5"),
        (None, "The answer is 5.\n\n**Problem 3.** Tom has 7 apples. The answer is 7.", "The answer is 5."),
        (None, "The answer is 5.\nHuman: thanks, and 3+4?", "The answer is 5."),
    ],
)
def test_a_question_of_its_own_ends_a_completion(form: str | None, text: str, kept: str) -> None:
    for reason in ("stop", "length"):
        output = ended(text, form, reason)
        assert (output.text, output.finish_reason, output.num_tokens) == (kept, "stop", 9)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("gsm8k", "2+3=5\n#### 5"),
        ("gsm8k", "2+3=5\n#### 5\n\nI hope this helps!"),
        ("gsm8k", "2+3=6\n#### 6\n\nWait, 2+3=5.\n#### 5"),
        ("gsm8k", "2+3=6\n#### 6\n\nLet me check that: 2+3=5.\n#### 5"),
        ("think", "<think>\nQuestion: what is 2+3? The answer is 5.\n\nQuestion: is it? #### 5\n"),
        ("think", "<think>\nProblem: 2+3.\nAnswer: 5\n\nProblem: check.\n</think>\n\n5"),
        ("think", "Question: what is 2+3?\n\n5"),
        ("plain", "Let me restate it.\nQuestion: what is 2+3?\nAnswer: 5"),
        ("boxed", "#### Step 1: add\n\nso 5\n\n#### Step 2: box\n\n\\boxed{5}"),
        ("boxed", "The pair is\n\n\\boxed{5}"),
        (None, ""),
        (None, "<|im_end|>"),
    ],
)
def test_an_answer_is_not_cut_short(form: str | None, text: str) -> None:
    assert ended(text, form) == GenerationOutput(text, "stop", 9, 3, 0.0)


def test_a_cut_behind_the_answer_is_no_cut() -> None:
    output = ended("2+3=5\n#### 5\n\nTom has 7 app", reason="length")
    assert (output.text, output.finish_reason) == ("2+3=5\n#### 5", "stop")
    assert ended("2+3=6\n#### 6\n\nWait, th", reason="length").finish_reason == "length"
    assert ended("2+3=5, so", reason="length").finish_reason == "length"


def test_stop_strings_of_ones_own_take_the_place_of_the_rule() -> None:
    text = "5\nQuestion: 3+4?\nEND"
    assert ended(text, stop=()).text == text
    assert ended(text, stop=("END", "\nQ")).text == "5"
    assert ended(text, stop=("END",)).text == "5\nQuestion: 3+4?"
    assert ended("5", reason="length", stop=("END",)).finish_reason == "length"


def test_published_answers_are_whole_and_end_before_the_next_question(shared_data: Path) -> None:
    """GSM8K's own solutions, and 5,276 answers of GPT-3 models: none is cut; each followed by another is cut there."""
    solved = list(read_jsonl(shared_data / "gsm8k" / "test.jsonl"))
    for row, following in zip(solved, [*solved[1:], solved[0]], strict=True):
        assert ended(row["answer"]).text == row["answer"]
        for join in ("\n\nQuestion: {}\nAnswer: ", "\n\n{}\n"):
            run_on = row["answer"] + join.format(following["question"]) + following["answer"]
            assert ended(run_on, reason="length").text == row["answer"]
    for row in read_jsonl(shared_data / "model_outputs" / "openai_gpt3_gsm8k.jsonl"):
        assert ended(row["response"], "plain").text == row["response"]


@given(
    st.text(st.sampled_from("\n#5 Q:Question<think/>|im_end\\boxed{}."), max_size=120), st.sampled_from(sorted(PRESETS))
)
@settings(max_examples=150, deadline=None)
def test_what_is_kept_is_the_beginning_and_ends_nowhere_else(text: str, form: str) -> None:
    output = ended(text, form)
    assert text.startswith(output.text)
    assert ended(output.text, form).text == output.text


@pytest.mark.parametrize("pattern", ["\nQuestion: ", "#### 5\n", "<|im_end", "\n\\boxed{5}\n", "Q: 5\n\n"])
@pytest.mark.timeout(120)  # quadratic time would take hours
def test_long_text_hangs_nothing(pattern: str) -> None:
    ended((pattern * 100_000)[:200_000], "boxed")
