"""The examples that are shown when training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


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
