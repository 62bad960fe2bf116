"""`openthoughts_think` really runs: rows of the data's own shape, LoRA with the KL term, the best checkpoint, and a merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.recipes.running import TRAINING, WAYS, FinishedRecipe, copy_recipe
from trl_reasoning_distill.data.files import read_json, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.sources import load_problems


@pytest.fixture(scope="module", params=WAYS)
def finished(
    request: pytest.FixtureRequest, repository: Path, quickstart_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRecipe:
    folder = tmp_path_factory.mktemp("openthoughts_think")
    rows = [
        {
            "system": "Think first.",
            "conversations": [
                {"from": "user", "value": problem.question},
                {
                    "from": "assistant",
                    "value": f"<|begin_of_thought|>\n\n{problem.solution}\n\n<|end_of_thought|>\n\n"
                    f"<|begin_of_solution|>\n\n{problem.answer}\n\n<|end_of_solution|>",
                },
            ],
        }
        for problem in load_problems("synthetic_arithmetic", limit=60)
    ]
    write_jsonl(folder / "openthoughts.jsonl", rows)
    student = str(quickstart_models / "student")
    overrides = {
        "sft": TRAINING
        | {
            "model_name_or_path": student,
            "dataset_name": None,
            "dataset_path": "openthoughts.jsonl",
            "eval_share": 0.1,
            "eval_steps": 1,
            "save_steps": 1,
            "logging_steps": 1,
        },
        "evaluate": {
            "models": {"base": student, "sft": "runs/openthoughts_think/sft/final_model"},
            "source": "synthetic_arithmetic",
            "split": "test",
            "limit": 4,
            "max_new_tokens": 64,
            "system_prompt": "",
        },
        "report": {"resamples": 200},
    }
    return request.param(copy_recipe(repository / "recipes" / "openthoughts_think", folder, overrides))


def test_it_trains_with_the_recipes_terms(finished: FinishedRecipe) -> None:
    manifest = read_manifest(finished.runs / "sft")
    assert manifest.status == "finished"
    expected = {"use_kl_regularization": True, "kl_coef": 0.1, "early_stopping_patience": 3, "max_grad_norm": 1.0}
    assert {key: manifest.config[key] for key in expected} == expected
    assert manifest.counts["rows"] == 54
    assert "kl_loss" in manifest.counts
    assert "54 rows" in finished.output
    assert "100.0% with reasoning" in finished.output


def test_both_models_load(finished: FinishedRecipe) -> None:
    for name in ("final_model", "merged_model"):
        AutoModelForCausalLM.from_pretrained(finished.runs / "sft" / name)


def test_form_and_accuracy_of_base_and_student_are_reported(finished: FinishedRecipe) -> None:
    metrics = read_json(finished.runs / "evaluate" / "metrics.json")["models"]
    assert set(metrics) == {"base", "sft"}
    assert all(model["n"] == 4 for model in metrics.values())
    assert (finished.runs / "report" / "report.html").is_file()
