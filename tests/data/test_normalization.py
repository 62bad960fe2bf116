"""Every published row shape becomes the same training row, typed over all rows; what cannot be learnt from is left out by number."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from datasets import Dataset

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import ROW_NUMBER, HostileRowError, normalize_rows
from trl_reasoning_distill.data.published import Reading, detect_shape
from trl_reasoning_distill.data.row_files import parse_json
from trl_reasoning_distill.data.row_sets import normalize, to_dataset

THINK, GSM8K, BOXED = (ReasoningFormat.preset(name) for name in ("think", "gsm8k", "boxed"))
Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


ASKED, REPLY = user("What is 2+2?"), "<think>\nTwo plus two.\n</think>\n\n4"
EXPECTED = {"prompt": [ASKED], "completion": [assistant(REPLY)]}
WEATHER = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
]
CALL = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL, prompt and completion": ("prompt_completion", EXPECTED),
    "a text prompt, a completion as messages": ("prompt_completion", {"prompt": "What is 2+2?", "completion": [assistant(REPLY)]}),
    "messages, a text completion": ("prompt_completion", {"prompt": [ASKED], "completion": REPLY}),
    "a single message": ("prompt_completion", {"prompt": ASKED, "completion": assistant(REPLY)}),
    "OpenAI's messages": ("messages", {"messages": [ASKED, assistant(REPLY)]}),
    "content parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": REPLY}]},
            ]
        },
    ),
    "text for content": ("messages", {"messages": [{"role": "user", "text": "What is 2+2?"}, {"role": "assistant", "text": REPLY}]}),
    "reasoning_content": ("messages", {"messages": [ASKED, {**assistant("4"), "reasoning_content": "Two plus two."}]}),
    "reasoning": ("messages", {"messages": [ASKED, {**assistant("4"), "reasoning": "Two plus two."}]}),
    "reasoning_content, empty on the user's side": (
        "messages",
        {"conversations": [{**ASKED, "reasoning_content": ""}, {**assistant("4"), "reasoning_content": "Two plus two."}]},
    ),
    "a thought in its field and in the text": ("messages", {"messages": [ASKED, {**assistant(REPLY), "reasoning_content": "Two plus two."}]}),
    "ShareGPT": ("messages", {"id": "x_0", "conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": REPLY}]}),
    "ShareGPT, other words": ("messages", {"conversations": [{"from": "User", "value": "What is 2+2?"}, {"from": "chatgpt", "value": REPLY}]}),
    "a column of JSON": ("messages", {"messages": json.dumps([ASKED, assistant(REPLY)])}),
    "a column of JSON in an old file": ("messages", {"conversation": [{"input": "What is 2+2?", "output": REPLY}]}),
    "dolphin-r1": ("messages", {"messages": [ASKED], "reasoning": "Two plus two.", "answer": "4", "model": "r1"}),
    "Nemotron": ("messages", {"input": [ASKED], "output": REPLY, "reasoning": "on", "category": "math"}),
    "AM-DeepSeek": (
        "messages",
        {"messages": [{**ASKED, "info": {"source": "x"}}, {**assistant(REPLY), "info": {"reference_answer": "4", "think_content": "…"}}]},
    ),
    "Mixture-of-Thoughts": ("messages", {"messages": [ASKED, assistant(REPLY)], "num_tokens": 12, "source": "x"}),
    "UltraChat": ("messages", {"prompt": "What is 2+2?", "prompt_id": "1", "messages": [ASKED, assistant(REPLY)]}),
    "OpenThoughts2": ("messages", {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": REPLY}], "source": "x"}),
    "Bespoke-Stratos": (
        "openthoughts",
        {
            "system": "Use <|begin_of_thought|>.",
            "conversations": [
                {"from": "user", "value": "What is 2+2?"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>\n\nTwo plus two.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>",
                },
            ],
        },
    ),
    "NuminaMath-CoT": ("messages", {"source": "x", "problem": "What is 2+2?", "solution": REPLY, "messages": [ASKED, assistant(REPLY)]}),
    "Alpaca": ("alpaca", {"instruction": "What is 2+2?", "input": "", "output": REPLY}),
    "Stanford's Alpaca": ("alpaca", {"instruction": "What is 2+2?", "output": REPLY, "text": "Below is an instruction …"}),
    "ms-swift": ("alpaca", {"query": "What is 2+2?", "response": REPLY}),
    "Magpie": ("alpaca", {"instruction": "What is 2+2?", "response": REPLY, "task_category": "Math"}),
    "reasoning-v1": ("question_answer", {"prompt": "What is 2+2?", "response": REPLY}),
    "medical-o1": ("question_answer", {"Question": "What is 2+2?", "Complex_CoT": "Two plus two.", "Response": "4"}),
    "OpenCodeReasoning": ("question_answer", {"input": "What is 2+2?", "output": REPLY}),
    "LIMO": ("question_answer", {"question": "What is 2+2?", "solution": "Two plus two.", "answer": "4"}),
    "GSM8K": ("gsm8k", {"question": "What is 2+2?", "answer": "Two plus two.\n#### 4"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_become_one(name: str) -> None:
    shape, row = PUBLISHED[name]
    assert detect_shape(row) == shape
    for reading in (Reading(THINK), Reading(THINK, shape)):
        read = normalize_rows([row], reading)
        assert (read.rejected, read.shapes) == ([], {shape: 1})
        assert {column: read.rows[0][column] for column in EXPECTED} == EXPECTED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_training_row_is_read_as_itself_and_datasets_and_files_alike(name: str) -> None:
    row = PUBLISHED[name][1]
    once = normalize_rows([row], Reading(THINK)).rows
    assert normalize_rows(once, Reading(THINK)).rows == once
    for rows in ([row], Dataset.from_list([row])):
        dataset, line = normalize(rows, Reading(THINK), "mine.jsonl")
        assert line.startswith("mine.jsonl: 1 rows")
        assert [dataset[0][column] for column in EXPECTED] == list(EXPECTED.values())
        assert dataset[ROW_NUMBER] == [1]
        again, line = normalize(dataset, Reading(THINK))
        assert again is dataset
        assert line.endswith("1 rows, ready to train on")


def test_what_stands_before_the_question_is_kept() -> None:
    alpaca = {
        "instruction": "Solve for x.", "input": "2x+3=7", "system": "Be terse.", "history": [["What is 2^3?", "8"]], "output": "x=2",
    }  # fmt: skip
    expected = [
        {"role": "system", "content": "Be terse."},
        user("What is 2^3?"),
        assistant("8"),
        user("Solve for x.\n2x+3=7"),
    ]
    assert normalize_rows([alpaca], Reading(THINK)).rows[0]["prompt"] == expected
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "2+2?"}]
    shared = {
        "system": "Be terse.",
        "conversations": [*turns, {"from": "gpt", "value": REPLY}],
        "tools": json.dumps(WEATHER),
    }
    (row,) = normalize_rows([shared], Reading(THINK)).rows
    assert row["prompt"] == [{"role": "system", "content": "Be terse."}, user("Hi"), assistant("Hello."), user("2+2?")]
    assert (row["completion"], row["tools"]) == ([assistant(REPLY)], WEATHER)
    (whole,) = normalize_rows([shared], Reading(THINK, every_reply=True)).rows
    assert whole["messages"] == [*row["prompt"], *row["completion"]]


def test_tool_calls_and_their_results() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": CALL}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    openai = {
        "messages": [user("Weather?"), {**called, "content": None}, result, assistant("Sunny.")],
        "tools": WEATHER,
    }
    (row,) = normalize_rows([openai], Reading(THINK)).rows
    assert row == {"prompt": [user("Weather?"), called, result], "completion": [assistant("Sunny.")], "tools": WEATHER}
    shared = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {}}'},
        ]
    }
    (row,) = normalize_rows([shared], Reading(THINK)).rows
    function = {"name": "get_weather", "arguments": {}}
    assert row["completion"] == [{**called, "tool_calls": [{"type": "function", "function": function}]}]
    thinking = {"messages": [user("Weather?"), {**called, "reasoning_content": "Ask the tool."}]}
    (row,) = normalize_rows([thinking], Reading(THINK)).rows
    assert row["completion"] == [{**called, "content": "<think>\nAsk the tool.\n</think>"}]


def test_weights_say_which_reply_is_learnt() -> None:
    turns = [user("a"), {**assistant("A"), "weight": 1}, user("b"), {**assistant("B"), "weight": 0}]
    (row,) = normalize_rows([{"messages": turns}], Reading(THINK)).rows
    assert row == {"prompt": [user("a")], "completion": [assistant("A")]}
    none = [user("a"), {**assistant("A"), "weight": 0}]
    odd = [user("a"), {**assistant("A"), "weight": 0.5}]
    read = normalize_rows([{"messages": none}, {"messages": odd}], Reading(THINK))
    assert [reason for _, reason in read.rejected] == [
        "every reply has the weight 0: there is nothing to learn",
        "a turn has the weight 0.5; known are 0 and 1",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("q"), {"role": "assistant", "content": None}]}, r"turn 2 \(assistant\) has no content"),
        ({"messages": [user("q"), assistant(" ")]}, "its last reply is empty"),
        ({"messages": [user("q")]}, "ends with a turn of user: there is no reply"),
        ({"messages": [assistant("a")]}, "nobody asks anything"),
        ({"messages": [{"role": "parrot", "content": "q"}]}, "turn 1 has the unknown role 'parrot'"),
        ({"messages": ["q", "a"]}, "a turn of the conversation is no object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("a")]}, "a part of type 'image_url': only text"),
        ({"messages": [user("q"), {"role": "assistant", "content": 4}]}, "has a int for content"),
        ({"messages": [user("q"), {**assistant("<think>a</think>4"), "reasoning_content": "other"}]}, "a reasoning beside its content"),
        ({"messages": [user("q"), assistant("a")], "tools": "{"}, "its tools is not JSON"),
        ({"messages": [user("q"), assistant("a")], "tools": ["x"]}, "not a list of JSON schemas"),
        ({"prompt": [user("q")], "completion": []}, "there is no reply"),
        ({"prompt": "q", "completion": " "}, "its completion is empty"),
        ({"prompt": "q"}, "its completion is empty"),
        ({"prompt": [user("q")], "answer": "4"}, "there is no reply"),
        ({"instruction": "q", "output": None, "response": ""}, "there is no reply"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "no list of pairs"),
        ({"text": " "}, "its text is empty"),
        ({"question": "2+2? \ud83d", "answer": "4", "reasoning": "a"}, r"its prompt holds half of a character \(\\ud83d\)"),
        ({"messages": [user("q\0"), assistant("a")]}, "its prompt holds a NUL character"),
        ({"prompt": "q", "completion": "a\0"}, "its completion holds a NUL character"),
        ({"text": "a\0"}, "its text holds a NUL character"),
        ({"question": "q", "answer": math.nan, "reasoning": "r"}, "it has nan where text or a number is wanted"),
        ({"question": "q", "answer": "4"}, "it has no reasoning to put in <think>"),
        ({"url": "x"}, r"the columns \['url'\] are none of the shapes prompt_completion, messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_left_out_with_its_number_and_reason(row: dict[str, Any], reason: str) -> None:
    read = normalize_rows([EXPECTED, row, EXPECTED], Reading(THINK))
    assert (len(read.rows), read.numbers) == (2, [1, 3])
    (number, found) = read.rejected[0]
    assert number == 2
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found)
    assert "1 left out: 1 × " in str(read)
    assert "(row 2)" in str(read)
    with pytest.raises(ValueError, match=r"No row of mine.jsonl can be learnt from .*\(row 1\)"):
        normalize([row], Reading(THINK), "mine.jsonl")


def test_answers_are_the_text_that_was_written() -> None:
    rows = parse_json(
        '[{"question": "a", "answer": 4, "reasoning": "r"}, {"question": "b", "answer": 0.10, "reasoning": "r"},'
        '{"question": "c", "answer": "5", "reasoning": "r"}, {"question": "d", "answer": 1180591620717411303424, "reasoning": "r"}]'
    )
    dataset, _ = normalize(rows, Reading(THINK))
    assert dataset["answer"] == ["4", "0.10", "5", "1180591620717411303424"]
    assert [row["completion"][0]["content"].rsplit("\n")[-1] for row in dataset] == list(dataset["answer"])


def test_columns_that_the_first_row_lacks_are_kept_exactly() -> None:
    options = {"enable_thinking": True}
    tools = [{"function": {"name": "f", "parameters": {"default": None, "enum": ["4", 4, 0.5]}}}]
    rows = [
        EXPECTED,
        {**EXPECTED, "tools": tools, "kind": "x", "level": 3, "mixed": "4"},
        {**EXPECTED, "chat_template_kwargs": options, "level": 2**70, "mixed": 4},
        {"messages": [user("q"), {**assistant("a"), "tool_calls": CALL}]},
    ]
    dataset, line = normalize(rows, Reading(THINK))
    assert "4 rows from 4 of shapes prompt_completion (3), messages (1), 0 left out" in line
    assert dataset["tools"] == [None, tools, None, None]
    assert dataset["chat_template_kwargs"] == [None, None, options, None]
    assert (dataset["kind"], dataset["level"], dataset["mixed"]) == (
        [None, "x", None, None],
        [None, 3, str(2**70), None],
        [None, "4", 4, None],
    )
    assert dataset[0]["completion"] == [assistant(REPLY)]
    assert dataset[3]["completion"] == [{**assistant("a"), "tool_calls": CALL}]


def test_a_dataset_of_plain_types_has_plain_features() -> None:
    """What TRL and the trainers read without a detour: strings, whole numbers, messages."""
    features = to_dataset([{**EXPECTED, "answer": "4", "n": 1, "share": 0.5, "ids": [1, 2]}] * 2).features
    assert features == Dataset.from_list([{**EXPECTED, "answer": "4", "n": 1, "share": 0.5, "ids": [1, 2]}]).features


@pytest.mark.parametrize(
    "variables", [{"chat_template": "{{ 'x' }}"}, '{"chat_template": "x"}', {"add_generation_prompt": True}]
)
def test_a_row_that_brings_a_template_refuses_the_whole_set(variables: Any) -> None:
    rows = [EXPECTED, {**EXPECTED, "chat_template_kwargs": variables}]
    with pytest.raises(HostileRowError, match="Row 2 sets"):
        normalize_rows(rows, Reading(THINK))
    with pytest.raises(ValueError, match=r"mine.jsonl: Row 2 sets .* chat_template_path"):
        normalize(rows, Reading(THINK), "mine.jsonl")


def test_the_shape_is_found_by_looking_at_all_rows() -> None:
    marked = {"question": "q", "answer": "so\n#### 1"}
    read = normalize_rows([{"question": "q", "answer": "72"}, marked, marked], Reading(THINK))
    assert read.rejected == [(1, "the answer has no #### line")], "in a file of GSM8K the whole text is no answer"
    assert read.shapes == {"gsm8k": 3}
    heading = {"question": "q", "answer": "x", "reasoning": "#### Step 1\nr"}
    assert normalize_rows([{**heading, "reasoning": "r"}, heading], Reading(THINK)).shapes == {"question_answer": 2}
    assert detect_shape({"question": "q", "answer": "#### Step 1\nadd\n\nSo 4"}) == "question_answer"


def test_a_shape_can_be_named() -> None:
    row = {"instruction": "q", "output": "a", "text": "whole"}
    assert normalize_rows([row], Reading(THINK, "text")).rows[0]["text"] == "whole"
    assert normalize_rows([row], Reading(THINK, "alpaca")).rows[0]["completion"] == [assistant("a")]
    assert normalize_rows([{"question": "q", "answer": "4"}], Reading(THINK, "none")).rows == []
    assert normalize_rows([PUBLISHED["ShareGPT"][1]], Reading(THINK, "sharegpt")).shapes == {"messages": 1}
    with pytest.raises(ValueError, match="Unknown data_shape 'parrot'; there are auto, none, prompt_completion"):
        Reading(THINK, "parrot")


def test_a_thought_tagged_otherwise_is_written_in_the_format() -> None:
    row = {"messages": [ASKED, assistant("<think>\nTwo plus two.\n</think>\n\nIt is \\boxed{4}.")]}
    for form, reply in ((GSM8K, "Two plus two.\n#### 4"), (BOXED, "Two plus two.\n\n\\boxed{4}")):
        assert normalize_rows([row], Reading(form)).rows[0]["completion"] == [assistant(reply)]
    assert normalize_rows([row], Reading(THINK)).rows[0]["answer"] == "4"


def test_rows_without_a_reply_where_a_model_writes_it() -> None:
    reading = Reading(THINK, needs_reply=False)
    rows = [{"prompt": "q"}, {"prompt": [user("q")]}, {"messages": [user("q")]}, {"prompt": [user("q")], "answer": "4"}]
    read = normalize_rows(rows, reading)
    assert read.rejected == []
    assert [row["completion"] for row in read.rows] == ["", *[[assistant("")]] * 3]
    assert read.rows[3]["answer"] == "4"


def test_tokens_and_text_stay_what_they_are() -> None:
    tokens = {"input_ids": [1, 2], "labels": [-100, 2], "kd_index": [-1, 0]}
    assert normalize_rows([tokens], Reading(THINK)).rows == [tokens]
    dataset, _ = normalize(Dataset.from_list([{"body": "words", "text": None}]), Reading(THINK, text_field="body"))
    assert dataset["text"] == ["words"]
