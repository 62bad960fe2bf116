"""The examples that are shown when training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.trainer import tiny
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.preview import describe_examples
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

THINK = ReasoningFormat.preset("think")


def test_supervised_tokens_are_marked_and_read_back(tokenizer: Any) -> None:
    row = vars(tokenize_example(tokenizer, tiny.make_rows(3)[2]))
    supervised = sum(label != -100 for label in row["labels"])
    assert describe_examples([row], tokenizer, THINK) == (
        f"--- example 1: {len(row['labels'])} tokens, {supervised} supervised ⟦…⟧\n"
        "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso so 2+3\n</think>\n\n5<|im_end|>\n⟧\n"
        "--- reads back as a reasoning of 3 words and the answer '5'; well formed (think)"
    )


def test_long_texts_show_their_ends(tokenizer: Any) -> None:
    row = {**tiny.make_rows(1)[0]}
    row["completion"] = [{"role": "assistant", "content": THINK.render("x" * 5000, "7")}]
    text = describe_examples([vars(tokenize_example(tokenizer, row))], tokenizer, THINK)
    assert len(text) < 1200
    assert "characters…]" in text
    assert "the answer '7'" in text


def test_three_examples_are_shown_when_training_starts(
    fit: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False)
    assert "example" not in capsys.readouterr().out
    trainer.train()
    out = capsys.readouterr().out
    assert [out.count(f"--- example {number}:") for number in (1, 2, 3, 4)] == [1, 1, 1, 0]
    fit(ReasoningSFTTrainer, ReasoningSFTConfig, preview_examples=0, max_steps=1)
    assert "example" not in capsys.readouterr().out


def test_packed_rows_are_shown_before_they_are_packed(fit: Callable[..., Any]) -> None:
    trainer = fit(
        ReasoningSFTTrainer,
        ReasoningSFTConfig,
        train=False,
        packing=True,
        max_length=120,
        per_device_train_batch_size=1,
    )
    assert trainer.preview.count("<|im_start|>user") == 3
