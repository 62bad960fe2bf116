"""`tinyllama_mixture` really runs: three sources of their own shapes, a fallback, QLoRA on the CPU, errors and charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.running import TRAINING, WAYS, FinishedRecipe, copy_recipe
from trl_reasoning_distill.data.files import read_json, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.sources import load_problems


@pytest.fixture(scope="module", params=WAYS)
def finished(
    request: pytest.FixtureRequest, repository: Path, quickstart_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRecipe:
    folder = tmp_path_factory.mktemp("tinyllama_mixture")
    problems = load_problems("synthetic_arithmetic", limit=48)
    grade_school = [{"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"} for p in problems[:24]]
    write_jsonl(folder / "copies" / "gsm8k" / "train.jsonl", grade_school)
    test = load_problems("synthetic_arithmetic", split="test", limit=4)
    write_jsonl(
        folder / "copies" / "gsm8k" / "test.jsonl",
        [{"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"} for p in test],
    )
    hard = [{"input": p.question, "code": "pass", "target": float(p.answer)} for p in problems[24:36]]
    write_jsonl(folder / "copies" / "gsm_hard" / "test.jsonl", hard)
    student = str(quickstart_models / "student")
    overrides = {
        "data": {
            "mixture": {
                "numinamath_qwq": {"count": 12, "fallback": "synthetic_arithmetic"},
                "gsm8k": {"count": 24, "split": "train"},
                "gsm_hard": {"count": 12},
            },
            "decontaminate": ["gsm8k:test"],
            "data_dir": "copies",
            "tokenizer": student,
        },
        "sft": TRAINING
        | {"model_name_or_path": student, "auto_find_batch_size": False, "lora_preset": "tinyllama", "bf16": False},
        "evaluate": {
            "models": {"base": student, "sft": "runs/tinyllama_mixture/sft/final_model"},
            "data_dir": "copies",
            "max_new_tokens": 64,
            "system_prompt": "",
        },
        "report": {"resamples": 200},
    }
    return request.param(copy_recipe(repository / "recipes" / "tinyllama_mixture", folder, overrides))


def test_a_source_that_cannot_be_had_is_replaced_by_its_fallback(finished: FinishedRecipe) -> None:
    sources = [row["source"] for row in finished.rows("data/problems.jsonl")]
    assert sources.count("gsm8k") == 24
    assert sources.count("gsm_hard") == 12
    assert sources.count("synthetic_arithmetic") == 12


def test_qlora_trains_with_the_recipes_settings_and_merges(finished: FinishedRecipe) -> None:
    adapter = read_json(finished.runs / "sft" / "final_model" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (32, 64, 0.1)
    assert len(adapter["target_modules"]) == 7
    config = read_manifest(finished.runs / "sft").config
    assert config["load_in_4bit"]
    assert config["use_bnb_nested_quant"]
    assert config["optim"] == "paged_adamw_32bit"
    assert (finished.runs / "sft" / "merged_model" / "model.safetensors").is_file()


def test_errors_have_kinds(finished: FinishedRecipe) -> None:
    comparison = read_json(finished.runs / "report" / "comparison.json")
    assert set(comparison["models"]) == {"base", "sft"}
    assert (finished.runs / "report" / "report.html").is_file()
