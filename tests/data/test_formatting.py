"""`ReasoningFormat`: exact round trips, defined behaviour on what models really write, linear time on hostile text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.formatting import (
    PRESETS,
    ParsedResponse,
    ReasoningFormat,
    last_boxed,
    split_marked_answer,
)

FORMATS = [
    *PRESETS.values(),
    ReasoningFormat("tags_and_box", "<think>", "</think>", answer_prefix="\\boxed{", answer_suffix="}"),
    ReasoningFormat(
        "answer_tags", "<think>", "</think>", gap="\n", answer_prefix="<answer>", answer_suffix="</answer>"
    ),
]
THINK = ReasoningFormat.preset("think")
BITS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        " ",
        "####",
        "#### ",
        "\\boxed{",
        "{",
        "}",
        "\\",
        "Final Answer: ",
        "final answer:",
        "</answer>",
        "<",
        "a",
        "42",
    ]
)
TEXT = st.one_of(st.text(max_size=30), st.lists(BITS, max_size=8).map("".join))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(max_examples=300, deadline=None)
@given(reasoning=TEXT, answer=TEXT)
def test_what_render_returns_parses_back_exactly(form: ReasoningFormat, reasoning: str, answer: str) -> None:
    try:
        text = form.render(reasoning, answer)
    except ValueError:
        return
    parsed = form.parse(text)
    assert (parsed.reasoning, parsed.answer) == (reasoning, answer)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(max_examples=200, deadline=None)
@given(
    reasoning=st.text(st.characters(exclude_characters="<>#\\{}\n:")),
    answer=st.text(st.characters(exclude_characters="<>#\\{}\n:")),
)
def test_text_without_markers_is_never_refused(form: ReasoningFormat, reasoning: str, answer: str) -> None:
    parsed = form.parse(form.render(reasoning, answer))
    assert parsed == ParsedResponse(reasoning, answer, bool(answer.strip()))


@settings(max_examples=200, deadline=None)
@given(reasoning=TEXT, answer=TEXT)
def test_think_refuses_exactly_what_holds_a_tag(reasoning: str, answer: str) -> None:
    holds_tag = any(tag in part for tag in ("<think>", "</think>") for part in (reasoning, answer))
    try:
        THINK.render(reasoning, answer)
    except ValueError:
        assert holds_tag
    else:
        assert not holds_tag


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(max_examples=200, deadline=None)
@given(text=TEXT, opened=st.booleans())
def test_parse_never_raises(form: ReasoningFormat, text: str, opened: bool) -> None:
    parsed = form.parse(text, opened=opened)
    assert not parsed.well_formed or (parsed.answer or "").strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nr\n</think>\n\na", ParsedResponse("r", "a", True)),
        ("  <think> r </think> a ", ParsedResponse("r", "a", True)),
        ("<think></think>a", ParsedResponse("", "a", True)),
        ("<think>\n\n</think>\n\na", ParsedResponse("", "a", True)),
        ("r\n</think>\na", ParsedResponse("r", "a", False)),
        ("<think>r", ParsedResponse("r", None, False)),
        ("<think>r</think>  ", ParsedResponse("r", None, False)),
        ("<think>\nr\n</think>\n\n", ParsedResponse("r", "", False)),
        (" a ", ParsedResponse(None, "a", False)),
        ("", ParsedResponse(None, None, False)),
        ("Hello <think>r</think>a", ParsedResponse("r", "a", False)),
        ("<think>r1</think>x<think>r2</think>a", ParsedResponse("r1</think>x<think>r2", "a", False)),
        ("<think>r1<think>r2</think>x</think>a", ParsedResponse("r1<think>r2</think>x", "a", False)),
        ("<think>r1</think>a<think>r2", ParsedResponse("r1</think>a<think>r2", None, False)),
        ("</think>a<think>r", ParsedResponse("</think>a<think>r", None, False)),
    ],
)
def test_think_on_what_models_write(text: str, expected: ParsedResponse) -> None:
    assert THINK.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r\n</think>\n\na", ParsedResponse("r", "a", True)),
        ("r", ParsedResponse("r", None, False)),
        ("<think>\nr\n</think>\n\na", ParsedResponse("r", "a", False)),
        ("r</think>x</think>a", ParsedResponse("r</think>x", "a", False)),
    ],
)
def test_think_when_the_prompt_opened_the_tag(text: str, expected: ParsedResponse) -> None:
    assert THINK.parse(text, opened=True) == expected


def test_is_opened_by_reads_the_generation_prompt(shared_data: Path) -> None:
    from jinja2 import Environment

    def prompt(name: str) -> str:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = lambda message: message
        template = environment.from_string((shared_data / "chat_templates" / name).read_text())
        return template.render(messages=[{"role": "user", "content": "1+1?"}], add_generation_prompt=True, bos_token="")

    assert THINK.is_opened_by("<|Assistant|><think>\n")
    assert not THINK.is_opened_by("is <think> a tag?<|im_end|>\n<|im_start|>assistant\n")
    assert not THINK.is_opened_by("<think>\n</think>\n")
    assert not THINK.is_opened_by(prompt("Qwen-Qwen2.5-7B-Instruct.jinja"))
    assert not ReasoningFormat.preset("plain").is_opened_by("")


@pytest.mark.parametrize(
    ("preset", "text", "expected"),
    [
        ("gsm8k", "48/2=24\n#### 24", ParsedResponse("48/2=24", "24", True)),
        ("gsm8k", "so ####24 ", ParsedResponse("so", "24", True)),
        ("gsm8k", "#### 1\nno\n#### 2", ParsedResponse("#### 1\nno", "2", True)),
        ("gsm8k", "no marker", ParsedResponse("no marker", None, False)),
        ("boxed", "r\n\n\\boxed{\\frac{1}{2}}", ParsedResponse("r", "\\frac{1}{2}", True)),
        ("boxed", "so $\\boxed{ 4 }$. Done", ParsedResponse("so $", "4", True)),
        ("boxed", "\\boxed{1} then \\boxed{2", ParsedResponse("", "1", True)),
        ("final_answer", "r\n\n**final answer:** 7", ParsedResponse("r\n\n**", "** 7", True)),
        ("final_answer", "r\n\nFinal Answer: 7", ParsedResponse("r", "7", True)),
        ("plain", "r1\n\nr2\n\n7", ParsedResponse("r1\n\nr2", "7", True)),
        ("plain", "7", ParsedResponse("", "7", True)),
    ],
)
def test_answer_markers(preset: str, text: str, expected: ParsedResponse) -> None:
    assert ReasoningFormat.preset(preset).parse(text) == expected


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{a\\boxed{b}c}", "a\\boxed{b}c"),
        ("\\boxed{a\\boxed{b}", "b"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\fbox {3}", "3"),
        ("\\boxed{", None),
        ("}}\\boxed{4}}}", "4"),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    box = last_boxed(text)
    assert (box and text[box[1] : box[2]]) == content


def test_render_writes_the_published_layouts() -> None:
    assert THINK.render("r", "a") == "<think>\nr\n</think>\n\na"
    assert ReasoningFormat.preset("gsm8k").render("r", "a") == "r\n#### a"
    assert ReasoningFormat.preset("gsm8k").render("", "a") == "#### a"
    assert ReasoningFormat.preset("boxed").render("r", "a") == "r\n\n\\boxed{a}"
    assert ReasoningFormat.preset("final_answer").render("r", "a") == "r\n\nFinal Answer: a"
    assert ReasoningFormat.preset("plain").render("", "a") == "a"


def test_messages_carry_the_system_prompt_only_if_there_is_one() -> None:
    assert THINK.messages("q") == [{"role": "user", "content": "q"}]
    assert ReasoningFormat.preset("think", system_prompt="s").messages("q")[0] == {"role": "system", "content": "s"}


def test_errors_teach() -> None:
    with pytest.raises(ValueError, match="Did you mean 'think'"):
        ReasoningFormat.preset("thnk")
    with pytest.raises(ValueError, match="two different tags, or neither"):
        ReasoningFormat("x", open_tag="<think>")
    with pytest.raises(ValueError, match="put white space in gap"):
        ReasoningFormat("x", answer_prefix=" #### ")
    with pytest.raises(ValueError, match="no answer_prefix"):
        ReasoningFormat("x", answer_suffix="}")
    with pytest.raises(ValueError, match="contains its own markers"):
        THINK.render("r", "</think>")


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    "bit", ["<think>", "</think>", "\\boxed{", "{", "\\", "\n", "Final Answer: ", "#", " ", "\\boxed   "]
)
@pytest.mark.timeout(120)  # quadratic time would take days
def test_hostile_text_hangs_nothing(form: ReasoningFormat, bit: str) -> None:
    text = bit * (1_000_000 // len(bit))
    parsed = form.parse(text)
    assert len(parsed.reasoning or "") + len(parsed.answer or "") <= len(text)


def count_lines(form: ReasoningFormat, text: str) -> int:
    """Lines of Python that `parse` runs; what they call (`find`, `rfind`, one pass of a pattern without nesting) is linear itself."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        form.parse(text)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    "bit", ["<think>", "</think>", "\\boxed{", "\\boxed{1}", "{}", "#### ", "Final Answer: ", "<answer>", "\n\n"]
)
def test_work_grows_no_faster_than_the_text(form: ReasoningFormat, bit: str) -> None:
    once, fourfold = count_lines(form, bit * 500), count_lines(form, bit * 2000)
    assert fourfold <= 4 * once + 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24\n#### 24", ("48/2 = 24", "24")),
        ("steps\n#### 1,072 ", ("steps", "1072")),
        ("#### 7", ("", "7")),
        ("#### 3 apples first\n#### 4", ("#### 3 apples first", "4")),
    ],
)
def test_a_marked_answer_is_split_from_its_steps(text: str, expected: tuple[str, str]) -> None:
    assert split_marked_answer(text) == expected


@pytest.mark.parametrize("text", ["72", "", "so it is 72\n####", "#### \n "])
def test_a_text_without_a_marked_answer_is_never_the_answer(text: str) -> None:
    with pytest.raises(ValueError, match="no #### line"):
        split_marked_answer(text)
