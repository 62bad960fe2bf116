"""Worked problems of the true shapes, as the datasets' cards show them, become demonstrations and training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.formatting import ReasoningFormat, remove_calculator_marks
from trl_reasoning_distill.data.normalization import normalize_rows
from trl_reasoning_distill.data.published import Reading, detect_shape
from trl_reasoning_distill.data.shapes import WORKED, Demonstration, demonstrations, split_reasoning, training_row

THINK, GSM8K, PLAIN = (ReasoningFormat.preset(name) for name in ("think", "gsm8k", "plain"))

OPEN_THOUGHTS: dict[str, Any] = {
    "system": "Your role as an assistant involves … <|begin_of_thought|> {thought} <|end_of_thought|> …",
    "conversations": [
        {"from": "user", "value": "Return your final response within \\boxed{}. What is 6 times 7?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nOkay, six sevens.\n\nThat is 42.\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\nSix times seven is \\(\\boxed{42}\\).\n\n<|end_of_solution|>",
        },
    ],
}
OPEN_THOUGHTS_METADATA = {
    "problem": "What is 6 times 7?",
    "deepseek_reasoning": "Okay, six sevens.",
    "deepseek_solution": "It is $\\boxed{42.0}$.",
    "ground_truth_solution": "$6 \\cdot 7 = \\boxed{42}$",
    "domain": "math",
    "source": "numina_math",
    "test_cases": None,
    "starter_code": None,
}
OPEN_R1: dict[str, Any] = {
    "problem": "## Task 1\n\nFind $x$ with $x + 2 = 5$.",
    "solution": "Subtract 2.",
    "answer": "3",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "586fd646-76d6-5070-8c81-9993ab9d8559",
    "is_reasoning_complete": [True, True, False, True],
    "generations": [
        "<think>\nHmm, maybe 7.\n</think>\n\nSo $\\boxed{7}$",
        "<think>\nBy the model's judgement.\n</think>\n\nIt is three.",
        "<think>\nI was cut",
        "<think>\n5 - 2 = 3\n</think>\n\nSo $\\boxed{3}$",
    ],
    "correctness_math_verify": [False, False, True, True],
    "correctness_llama": [False, True, None, None],
    "finish_reasons": None,
    "correctness_count": 1,
    "messages": [
        {"content": "## Task 1\n\nFind $x$ with $x + 2 = 5$.", "role": "user"},
        {"content": "<think>\n5 - 2 = 3\n</think>\n\nSo $\\boxed{3}$", "role": "assistant"},
    ],
}
NUMINA: dict[str, Any] = {
    "problem_id": 17,
    "prompt": "Compute $2^5$.",
    "ground_truth": "32",
    "response": "Doubling: 2, 4, 8, 16, 32.\n\n**Final Answer**\n\n\\[ \\boxed{32} \\]",
    "correct": True,
}
GSM8K_ROW = {
    "question": "Natalia sold clips to 48 friends, and half as many in May. How many?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>1,072 clips.\n#### 1,072",
}
S1K: dict[str, Any] = {
    "question": "1+1?",
    "solution": "2",
    "cot_type": "math",
    "source_type": "qfq/openaimath",
    "metadata": "{}",
    "cot": None,
    "thinking_trajectories": ["One more than one.", "That is two."],
    "attempt": "It is \\boxed{2}.",
}
S1K_1_1 = {name: value for name, value in S1K.items() if name not in ("thinking_trajectories", "attempt")} | {
    "gemini_thinking_trajectory": "By Gemini.", "gemini_attempt": "Gemini's \\boxed{2}.", "gemini_grade": "Yes",
    "deepseek_thinking_trajectory": "By DeepSeek.", "deepseek_attempt": "DeepSeek's \\boxed{2}.", "deepseek_grade": "Yes",
}  # fmt: skip
OPEN_MATH_REASONING = {
    "expected_answer": "2", "problem_type": "has_answer_extracted", "problem_source": "aops", "generation_model": "DeepSeek-R1",
    "pass_rate_72b_tir": "0.9", "problem": "1+1?", "generated_solution": "<think>\none more\n</think>\n\nIt is 2.", "inference_mode": "cot",
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        (
            OPEN_THOUGHTS,
            "openthoughts",
            Demonstration(
                "Return your final response within \\boxed{}. What is 6 times 7?",
                "Okay, six sevens.\n\nThat is 42.",
                "Six times seven is \\(\\boxed{42}\\).",
                "42",
            ),
        ),
        (
            OPEN_THOUGHTS_METADATA,
            "openthoughts",
            Demonstration("What is 6 times 7?", "Okay, six sevens.", "It is $\\boxed{42.0}$.", "42"),
        ),
        (OPEN_R1, "openr1_math", Demonstration(OPEN_R1["problem"], "5 - 2 = 3", "So $\\boxed{3}$", "3")),
        (
            NUMINA,
            "numinamath_qwq",
            Demonstration("Compute $2^5$.", "Doubling: 2, 4, 8, 16, 32.", "\\[ \\boxed{32} \\]", "32"),
        ),
        (
            GSM8K_ROW,
            "gsm8k",
            Demonstration(
                GSM8K_ROW["question"], "In May she sold 48/2 = 24 clips.\nIn all 48+24 = 1,072 clips.", "1072", "1072"
            ),
        ),
        (S1K, "s1k", Demonstration("1+1?", "One more than one.\nThat is two.", "It is \\boxed{2}.", "2")),
        (S1K_1_1, "s1k", Demonstration("1+1?", "By DeepSeek.", "DeepSeek's \\boxed{2}.", "2")),
        (
            {**S1K_1_1, "deepseek_grade": "No"},
            "s1k",
            Demonstration("1+1?", "By Gemini.", "Gemini's \\boxed{2}.", "2"),
        ),
        (OPEN_MATH_REASONING, "question_answer", Demonstration("1+1?", "one more", "It is 2.", "2")),
        (
            {"question": "1+1?", "solution": "One more than one is two.", "answer": 2},  # LIMO
            "question_answer",
            Demonstration("1+1?", "One more than one is two.", "2", "2"),
        ),
        ({"question": "1+1?", "answer": "2"}, "question_answer", Demonstration("1+1?", None, "2", "2")),
        ({"problem": "1+1?", "answer": 2}, "question_answer", Demonstration("1+1?", None, "2", "2")),
        (
            {"problem": "1+1?", "solution": "one more than one", "answer": "2", "level": 1},
            "question_answer",
            Demonstration("1+1?", "one more than one", "2", "2"),
        ),
        (
            {"question": "1+1?", "answer": "<think>\none more\n</think>\n\n2"},
            "question_answer",
            Demonstration("1+1?", "one more", "2", "2"),
        ),
    ],
)
def test_shapes(row: dict[str, Any], shape: str, expected: Demonstration) -> None:
    assert detect_shape(row) == shape
    assert demonstrations(row, shape)[0] == expected


def test_openr1_takes_what_was_verified_before_what_a_model_approved_and_nothing_else() -> None:
    assert [found.response for found in demonstrations(OPEN_R1, "openr1_math")] == ["So $\\boxed{3}$", "It is three."]
    assert len(normalize_rows([OPEN_R1], Reading(THINK)).rows) == 1
    assert len(normalize_rows([OPEN_R1], Reading(THINK, generations=4)).rows) == 2


def test_a_reply_without_a_heading_keeps_its_whole_text_as_reasoning() -> None:
    (found,) = demonstrations({**NUMINA, "response": "Doubling: 32."}, "numinamath_qwq")
    assert (found.reasoning, found.response) == ("Doubling: 32.", "\\boxed{32}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**OPEN_R1, "correctness_math_verify": [False] * 4, "correctness_llama": None}, "no generation is both"),
        ({**OPEN_R1, "is_reasoning_complete": [True] * 4, "correctness_math_verify": [0, 0, 1, 0], "correctness_llama": None}, "generation 2: the reasoning never ends"),
        ({**NUMINA, "correct": False}, "found wrong"),
        ({**GSM8K_ROW, "answer": "72"}, "no #### line"),
        ({**OPEN_THOUGHTS, "conversations": OPEN_THOUGHTS["conversations"][1:]}, "not a question and a reply"),
        ({"conversations": [{"from": "alien", "value": "<|begin_of_thought|>"}]}, "turn 1 has the unknown role 'alien'"),
        ({**S1K, "thinking_trajectories": []}, "no thinking trajectory"),
        ({**S1K_1_1, "deepseek_grade": "No", "gemini_grade": "No"}, "none of its attempts was found right"),
        ({"question": " ", "answer": "2"}, "there is no question"),
        ({"question": "q", "answer": None}, "there is no answer"),
        ({"question": "q", "answer": "<think>r</think>"}, "nothing follows </think>"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_refused_with_its_reason(row: dict[str, Any], reason: str) -> None:
    shape = "gsm8k" if row.get("answer") == "72" else detect_shape(row) or "question_answer"
    with pytest.raises(ValueError, match=reason):
        demonstrations(row, shape)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="shape numinamath_qwq needs the column 'response'"):
        demonstrations({"prompt": "q"}, "numinamath_qwq")


def test_training_rows_in_every_format() -> None:
    (gsm8k,) = demonstrations(GSM8K_ROW, "gsm8k")
    assert training_row(gsm8k, THINK) == {
        "prompt": [{"role": "user", "content": GSM8K_ROW["question"]}],
        "completion": [{"role": "assistant", "content": THINK.render(gsm8k.reasoning or "", "1072")}],
        "answer": "1072",
    }
    assert training_row(gsm8k, GSM8K)["completion"][0]["content"].endswith("clips.\n#### 1072")
    assert training_row(gsm8k, GSM8K)["prompt"][0]["role"] == "system"
    brief = ({"role": "system", "content": "Be brief."},)
    asked = Demonstration("1+1?", "1+1 = 2", "\\boxed{2}", "2", brief)
    assert training_row(asked, GSM8K)["prompt"][0] == brief[0]
    assert training_row(asked, GSM8K)["completion"][0]["content"] == "1+1 = 2\n#### 2"
    boxed = training_row(demonstrations(OPEN_THOUGHTS, "openthoughts")[0], ReasoningFormat.preset("boxed"))
    assert boxed["completion"][0]["content"] == "Okay, six sevens.\n\nThat is 42.\n\n\\boxed{42}"


def test_a_format_is_not_given_what_the_row_has_not() -> None:
    bare = demonstrations({"question": "Why?", "response": "Because."}, "question_answer")[0]
    assert training_row(bare, PLAIN)["completion"][0]["content"] == "Because."
    with pytest.raises(ValueError, match="no reasoning to put in <think>"):
        training_row(bare, THINK)
    with pytest.raises(ValueError, match="no final answer to put after '####'"):
        training_row(bare, GSM8K)


def test_rejected_rows_are_counted_with_their_reasons() -> None:
    read = normalize_rows([NUMINA, {**NUMINA, "correct": False}, NUMINA], Reading(THINK))
    assert (len(read.rows), read.numbers) == (2, [1, 3])
    assert read.rejected == [(2, "its answer was found wrong")]


TEXT = st.text(st.characters(exclude_characters="<|\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(question=TEXT, reasoning=TEXT, response=TEXT)
def test_a_tagged_reply_comes_back_whole(question: str, reasoning: str, response: str) -> None:
    for open_tag, close_tag in (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>")):
        text = f"{open_tag}\n{reasoning}\n{close_tag}\n\n{response}"
        assert split_reasoning(text) == (reasoning.strip(), response.strip())
        row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text}]}
        (made,) = normalize_rows([row], Reading(THINK)).rows
        parsed = THINK.parse(made["completion"][0]["content"])
        assert (str(parsed.reasoning).strip(), str(parsed.answer).strip()) == (reasoning.strip(), response.strip())


@pytest.mark.parametrize("shape", WORKED)
def test_hostile_text_hangs_nothing(shape: str) -> None:
    for bit in ("<<", "<<1=", "<think>", "</think>", "<|begin_of_thought|>", "####", "\\boxed{", "**Final Answer**"):
        text = bit * (200_000 // len(bit))
        row = {
            "question": text,
            "problem": text,
            "prompt": text,
            "answer": text,
            "response": text,
            "generations": [text],
        }
        row |= {"correctness_math_verify": [True], "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}  # fmt: skip
        normalize_rows([row], Reading(THINK, shape))


def test_all_of_gsm8k(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").open()]
    read = normalize_rows(rows, Reading(THINK))
    assert not read.rejected
    assert not any("<<" in row["completion"][0]["content"] for row in read.rows)
    assert remove_calculator_marks(rows[0]["answer"]).count("<<") == 0
