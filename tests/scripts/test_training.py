"""The training stages with their options: data of other shapes, adapters, 4 bits, merging, accuracy, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.trainer import tiny
from trl_reasoning_distill.data.files import read_json, read_jsonl, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.scripts import sft
from trl_reasoning_distill.scripts.arguments import AccuracyArguments
from trl_reasoning_distill.scripts.stage import parse_stage
from trl_reasoning_distill.scripts.training import TrainingDataArguments
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig

IDS = torch.arange(3, 30)[None]
QUICK = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "preview_examples": 0,
}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student"
    tiny.make_model().save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def run(tmp_path: Path, student: Path) -> Callable[..., Path]:
    """`run(**options)`: the output folder of an `sft` stage."""
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "answer": str(2 * n + 1)} for n, row in enumerate(tiny.make_rows())])

    def start(**options: Any) -> Path:
        settings = {
            **QUICK,
            "model_name_or_path": str(student),
            "dataset_path": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "out"),
            **options,
        }
        config = tmp_path / "sft.yaml"
        config.write_text(json.dumps(settings))
        sft.main(["--config", str(config)])
        return Path(settings["output_dir"])

    return start


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_run_leaves_model_merged_model_card_log_and_evaluation(run: Callable[..., Path], student: Path) -> None:
    out = run(
        lora_preset="cot_lora", merge=True, learning_rate=0.05, eval_strategy="steps", eval_steps=1, eval_share=0.25,
        accuracy_problems=2, accuracy_max_new_tokens=4, metric_for_best_model="math_accuracy", save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, early_stopping_patience=3,
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "eval_results.json", "final_model", "log.jsonl", "manifest.json", "merged_model", "trainer_state.json",
    }  # fmt: skip
    adapter = read_json(out / "final_model" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (8, 16, 6)
    base = AutoModelForCausalLM.from_pretrained(student)
    together = logits(PeftModel.from_pretrained(base, out / "final_model"))
    for folder in ("final_model", "merged_model"):
        assert (out / folder / "README.md").read_text() == (out / "README.md").read_text()
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out / folder)), together)
    assert not torch.equal(together, logits(AutoModelForCausalLM.from_pretrained(student)))
    evaluation, log = read_json(out / "eval_results.json"), list(read_jsonl(out / "log.jsonl"))
    assert {"eval_loss", "eval_math_accuracy", "eval_math_truncated"} <= evaluation.keys()
    assert log == read_json(out / "trainer_state.json")["log_history"]
    assert "eval_math_accuracy" in read_json(out / "manifest.json")["counts"]


def test_four_bits_with_the_recipes_settings(run: Callable[..., Path], student: Path) -> None:
    """NF4 with double quantisation, paged AdamW, checkpointing, cosine with warm-up, clipping; merged into full precision."""
    out = run(
        lora_preset="tinyllama", load_in_4bit=True, use_bnb_nested_quant=True, bnb_4bit_quant_type="nf4", merge=True,
        optim="paged_adamw_32bit", gradient_checkpointing=True, lr_scheduler_type="cosine", warmup_steps=0.05,
        weight_decay=0.05, max_grad_norm=1.0, learning_rate=0.05,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(student)
    together = logits(PeftModel.from_pretrained(base, out / "final_model"))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged_model", dtype="auto")
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), together, rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    assert "| base quantised to | 4 bits while training |" in card
    assert "| optim | paged_adamw_32bit |" in card


def test_out_of_memory_halves_the_batch(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

    sizes, compute_loss = [], ReasoningSFTTrainer.compute_loss

    def out_of_memory(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ReasoningSFTTrainer, "compute_loss", out_of_memory)
    run(auto_find_batch_size=True, per_device_train_batch_size=4)
    assert sizes[0] == 4
    assert set(sizes[1:]) == {2} or sizes[-1] <= 2


OPEN_THOUGHTS = {
    "system": "Use <|begin_of_thought|>.",
    "conversations": [
        {"from": "user", "value": "1+2?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\none two three\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n3\n\n<|end_of_solution|>",
        },
    ],
}


def test_data_of_another_shape_is_trained_on(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = {**OPEN_THOUGHTS, "conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": "<|begin_of_thought|> hm"}]}  # fmt: skip
    write_jsonl(tmp_path / "open.jsonl", [OPEN_THOUGHTS] * 5 + [cut])
    out = run(dataset_path=str(tmp_path / "open.jsonl"), max_steps=1, preview_examples=1)
    shown = capsys.readouterr().out
    assert "5 rows from 6 of shape openthoughts, 1 left out: 1 × the reasoning never ends" in shown
    assert "⟦<think>\none two three\n</think>\n\n3<|im_end|>\n⟧" in shown
    assert read_json(out / "manifest.json")["counts"]["rows"] == 5


def test_a_quick_test_takes_some_rows(run: Callable[..., Path]) -> None:
    out = run(limit=3, max_steps=1)
    assert read_json(out / "manifest.json")["counts"]["rows"] == 3


def test_unknown_shapes_are_named() -> None:
    with pytest.raises(
        ValueError, match="Unknown data_shape 'parrot'; there are auto, none, prompt_completion, messages"
    ):
        TrainingDataArguments(data_shape="parrot")


def test_problems_come_from_a_source_or_from_rows_with_answers() -> None:
    think, gsm8k = ReasoningFormat.preset("think"), ReasoningFormat.preset("gsm8k")
    rows: Any = [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in (("x", "1"), ("x", "1"), ("y", None), ("z", "3"))]  # fmt: skip
    found = AccuracyArguments(accuracy_problems=5).load(rows, think, 0)
    assert [(item.messages[0]["content"], item.answer) for item in found] == [("x", "1"), ("z", "3")]
    with pytest.raises(ValueError, match="Give accuracy_source"):
        AccuracyArguments(accuracy_problems=5).load(None, think, 0)
    options = '{"steps": [2], "split": "test"}'
    made = AccuracyArguments(3, accuracy_source="synthetic_arithmetic", accuracy_source_options=options).load(
        None, gsm8k, 0
    )
    assert len(made) == 3
    assert made[0].messages[0]["role"] == "system"


def test_what_would_fail_at_the_first_evaluation_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accuracy_problems=5 with eval_strategy=no"):
        AccuracyArguments(accuracy_problems=5).check(ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True))
    config = ReasoningSFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, eval_strategy="steps", metric_for_best_model="eval_math_accuracy"
    )
    with pytest.raises(ValueError, match=r"measured on held-out problems: set accuracy_problems"):
        AccuracyArguments().check(config)
    with pytest.raises(ValueError, match="`accuracy_problems=-1`: must be a whole number ≥ 0"):
        AccuracyArguments(accuracy_problems=-1)


def test_command_line_wins_over_yaml_and_presets(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(
        "lora_preset: tinyllama\nlora_alpha: 16\nchat_template_kwargs: {enable_thinking: true}\nbf16: false\nuse_cpu: true\n"
    )
    _, settings, model, _ = parse_stage(sft.make_parser(), ["--config", str(config), "--lora_r", "2", "--merge"])
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.merge) == (2, 16, 0.1, True)
    assert settings.chat_template_kwargs == {"enable_thinking": True}
    words = ["--bf16", "false", "--use_cpu", "--chat_template_kwargs", '{"enable_thinking": false}']
    assert parse_stage(sft.make_parser(), words)[1].chat_template_kwargs == {"enable_thinking": False}
