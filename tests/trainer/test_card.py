"""The model card, and pushing it with the model as TRL does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig

from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer


def card_of(trainer: Any) -> str:
    trainer.create_model_card(model_name="student", dataset_name="openai/gsm8k")
    return Path(trainer.args.output_dir, "README.md").read_text()


def test_the_card_says_what_a_reader_asks(fit: Callable[..., Any]) -> None:
    trainer = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, use_kl_regularization=True,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    card = card_of(trainer)
    assert card.startswith("---\n")
    for line in (
        "# Model Card for student",
        "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)",
        "<think>\nFirst the reasoning.\n</think>\n\n36",
        "This model was trained with Reasoning SFT",
        "| rows | 8 |",
        "| with reasoning | 100.0% |",
        "| batch | 4 (4 per device × 1 accumulated × 1 processes) |",
        "| LoRA | r 4, alpha 8, dropout 0.0, on ['q_proj'] |",
        "| KL to the reference | reverse, coefficient 0.1 |",
        "| steps | 2 |",
        "- trl_reasoning_distill: ",
        "- TRL: ",
    ):
        assert line in card, line
    assert "None" not in card.split("---")[2]
    assert "time machine" not in card


def test_the_card_names_the_teacher(fit: Callable[..., Any], store: Path) -> None:
    trainer = fit(TopKDistillTrainer, TopKDistillConfig, dataset=None, teacher_logits=str(store), kd_top_k=4)
    card = card_of(trainer)
    assert "### Teacher" in card
    assert "| teacher | tiny |" in card
    assert "forward_kl on tail, top 4 of 8 stored" in card
    assert "Distilling the Knowledge in a Neural Network" in card


def test_pushing_uploads_model_and_card(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uploaded: dict[str, Any] = {}

    def upload(**arguments: Any) -> SimpleNamespace:
        uploaded.update(arguments, files=sorted(path.name for path in Path(arguments["folder_path"]).iterdir()))
        return SimpleNamespace(commit_url="https://example.invalid")

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=f"me/{name}"), upload_folder=upload)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, push_to_hub=True, hub_model_id="student", max_steps=1)
    trainer.push_to_hub(dataset_name="openai/gsm8k")
    assert uploaded["repo_id"] == "me/student"
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= set(uploaded["files"])
    assert 'model="me/student"' in Path(trainer.args.output_dir, "README.md").read_text()
