"""Real chat templates against chains of thought: kept, or refused with the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from trl_reasoning_distill.data.row_check import advise
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

KEPT = ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B"]
OPENS_THE_THOUGHT = "Qwen-QwQ-32B"
DELETES_THE_THOUGHT = ["deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"]


@pytest.fixture
def with_template(
    shared_data: Path, tokenizer: Any, fit: Callable[..., Any]
) -> Iterator[Callable[..., ReasoningSFTTrainer]]:
    """`with_template(name, **config)`: an untrained trainer whose tokenizer has that model's template."""
    kept = tokenizer.chat_template

    def make(name: str, **options: Any) -> ReasoningSFTTrainer:
        if name.endswith(".jinja"):
            tokenizer.chat_template = (shared_data / "chat_templates" / name).read_text()
        else:
            tokenizer.chat_template = name
        return fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, **options)

    yield make
    tokenizer.chat_template = kept


@pytest.mark.parametrize("name", KEPT)
def test_templates_that_keep_the_reasoning(with_template: Callable[..., Any], name: str) -> None:
    trainer = with_template(f"{name}.jinja", max_length=2048)  # SmolLM3's own system prompt is long
    assert trainer.reports["train"].with_reasoning == 8
    assert trainer.preview.count("well formed (think)") == 3
    assert "not well formed" not in trainer.preview


def test_a_thought_that_the_prompt_closes_is_refused_with_the_fix(with_template: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"closed <think>…</think>.*chat_template_kwargs to \{\"enable_thinking\": true\}"
    ):
        with_template(f"{OPENS_THE_THOUGHT}.jinja")


def test_a_template_that_opens_the_thought_itself(with_template: Callable[..., Any], tokenizer: Any) -> None:
    trainer = with_template(f"{OPENS_THE_THOUGHT}.jinja", chat_template_kwargs={"enable_thinking": True})
    assert trainer.reports["train"].with_reasoning == 8
    for row in trainer.train_dataset:
        supervised = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert "<think>" not in supervised  # the prompt has it, once
        assert supervised.count("</think>") == 1
    assert "not well formed" not in trainer.preview


@pytest.mark.parametrize("name", DELETES_THE_THOUGHT)
def test_a_template_that_deletes_the_thought_is_refused_with_the_fix(
    with_template: Callable[..., Any], shared_data: Path, name: str
) -> None:
    template = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    with pytest.raises(ValueError, match=r"drops or doubles .* 8 of 8 rows.*`content\.split\('</think>'\)\[-1\]`"):
        with_template(f"{name}.jinja", **thinking)
    # The fix, done as the message says
    mended = template.replace("content.split('</think>')[-1]", "content")
    assert with_template(mended, **thinking).reports["train"].with_reasoning == 8


def test_advice_without_a_known_cause_stays_general() -> None:
    assert advise("{{ messages }}") == advise(None)
    assert "chat_template_path" in advise(None)


def test_earlier_turns_may_lose_their_thoughts(with_template: Callable[..., Any]) -> None:
    """Qwen3 deletes reasoning from history: what is supervised, the last turn, keeps its own."""
    rows = tiny.make_rows(2)
    long = [{**row, "prompt": [*rows[0]["prompt"], *rows[0]["completion"], *row["prompt"]]} for row in rows]
    from datasets import Dataset

    trainer = with_template("Qwen-Qwen3-0.6B.jinja", dataset=Dataset.from_list(long))
    assert trainer.reports["train"].with_reasoning == 2
    assert trainer.preview.count("</think>") == 2
