"""What a person is shown of rows, prompts and traces: exactly what is supervised, who says what, and no control characters."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.trainer import tiny
from trl_reasoning_distill.data.examples import describe_examples, describe_prompts, describe_trace
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Trace, Verdict
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.terminal import takes_colour

THINK = ReasoningFormat.preset("think")
MESSAGES = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+3? "}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_supervised_tokens_are_marked_and_read_back(tokenizer: Any) -> None:
    row = vars(tokenize_example(tokenizer, tiny.make_rows(3)[2]))
    supervised = sum(label != -100 for label in row["labels"])
    assert describe_examples([row], tokenizer, THINK) == (
        f"--- example 1: {len(row['labels'])} tokens, {supervised} supervised ⟦…⟧\n"
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso so 2+3\n</think>\n\n5<|im_end|>\n⟧\n"
        "--- reads back as a reasoning of 3 words and the answer '5'; well formed (think)"
    )


def test_in_colour_the_supervised_text_is_green_and_nothing_else(tokenizer: Any) -> None:
    row = vars(tokenize_example(tokenizer, tiny.make_rows(3)[2]))
    head, body = describe_examples([row], tokenizer, colour=True).split("\n", 1)
    green = "".join(re.findall(r"\x1b\[32(?:;1)?m(.*?)\x1b", body, re.DOTALL))
    assert green == tokenizer.decode([label for label in row["labels"] if label != -100])
    assert uncoloured(body) == tokenizer.decode(row["input_ids"])
    assert "\x1b[32;1m<|im_end|>" in body, "special tokens stand out"
    assert "\x1b[2;1m<|im_start|>" in body
    assert "⟦" not in head + body


def test_long_texts_show_their_ends(tokenizer: Any) -> None:
    row = {**tiny.make_rows(1)[0]}
    row["completion"] = [{"role": "assistant", "content": THINK.render("x" * 5000, "7")}]
    text = describe_examples([vars(tokenize_example(tokenizer, row))], tokenizer, THINK)
    assert len(text) < 1200
    assert "characters…]" in text
    assert "\n7<|im_end|>\n⟧" in text
    assert "the answer '7'" in text


def test_a_prompt_is_whole_as_the_model_reads_it_with_its_roles(tokenizer: Any) -> None:
    text = describe_prompts([MESSAGES], tokenizer)
    assert text == (
        "--- prompt 1: 77 tokens\n<|im_start|>system\nsystem⟦Think.⟧<|im_end|>\n<|im_start|>user\nuser⟦2+3?⟧ <|im_end|>\n<|im_start|>assistant\n"
    ).replace("77", str(len(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"])))
    coloured = describe_prompts([MESSAGES], tokenizer, colour=True)
    assert "\x1b[36m2+3?\x1b[0m" in coloured
    assert uncoloured(coloured) == re.sub("(system|user)⟦(.*?)⟧", r"\2", text)


def test_without_a_tokenizer_or_a_template_the_messages_are_shown(tokenizer: Any) -> None:
    assert describe_prompts([MESSAGES]) == "--- prompt 1: 2 messages\nsystem⟦Think.⟧\nuser⟦2+3?⟧ \n"
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    assert describe_prompts([MESSAGES], plain).endswith("\nsystem⟦Think.⟧\n\nuser⟦2+3?⟧ \n")


def test_a_trace_has_gold_and_verdict_and_what_it_holds_commands_no_terminal() -> None:
    trace = Trace("p", 1, "2+3?", "5", "<think>\x1b[31mred</think>\n\n6", "length", 9, "m", 0)
    text = describe_trace(trace, Verdict("incorrect", "numeric", "6 is not 5"))
    assert text == (
        "--- trace p #1: 9 tokens, cut at the limit\nuser⟦2+3?⟧\nassistant⟦<think>\N{REPLACEMENT CHARACTER}[31mred</think>\n\n6⟧\n"
        "--- gold: 5; verdict: incorrect (numeric: 6 is not 5)"
    )


def test_colour_is_for_terminals_whose_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert takes_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colour()
