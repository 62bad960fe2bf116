"""`openr1_context` really runs, from OpenR1-shaped rows to the report, with the quickstart's small models in place of Qwen's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.running import TRAINING, WAYS, FinishedRecipe, copy_recipe
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.data.files import read_json, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.sources import load_problems


@pytest.fixture(scope="module", params=WAYS)
def finished(
    request: pytest.FixtureRequest, repository: Path, quickstart_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRecipe:
    folder = tmp_path_factory.mktemp("openr1_context")
    rows = [
        {
            "problem": problem.question,
            "answer": problem.answer,
            "solution": problem.solution,
            "generations": [f"<think>\n{problem.solution}\n</think>\n\n{problem.answer}"],
            "correctness_math_verify": [True],
            "is_reasoning_complete": [True],
        }
        for problem in load_problems("synthetic_arithmetic", split="train", limit=12)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    teacher, student = (str(quickstart_models / role) for role in ("teacher", "student"))
    training = TRAINING | {
        "dataset_name": None,
        "dataset_path": "rows.jsonl",
        "limit": None,
        "model_name_or_path": student,
    }
    recipe = repository / "recipes" / "openr1_context"
    models = read_config(recipe / "evaluate.yaml")["models"] | {"base": student, "teacher": teacher}
    overrides = {
        "sft": training,
        "gkd": training | {"teacher": teacher, "teacher_model_init_kwargs": {"dtype": "float32"}, "kd_top_k": 10},
        "evaluate": {"models": models, "source": "synthetic_arithmetic", "limit": 4, "max_new_tokens": 64, "system_prompt": ""},
        "report": {"resamples": 200},
    }  # fmt: skip
    return request.param(copy_recipe(recipe, folder, overrides))


def test_the_student_learns_from_a_4_bit_teacher_with_examples_and_the_control_from_the_same_rows(
    finished: FinishedRecipe,
) -> None:
    control, distilled = (read_manifest(finished.runs / stage) for stage in ("sft", "gkd"))
    assert distilled.config["teacher_quantization"] == "4bit"
    assert distilled.config["teacher_context"] == "few_shot"
    assert distilled.counts["kd_loss"] > 0
    for name in ("steps", "rows", "supervised_tokens_seen", "tokens_seen"):
        assert control.counts[name] == distilled.counts[name], name
    assert (finished.runs / "gkd" / "final_model" / "adapter_model.safetensors").exists()


def test_the_report_compares_it_with_the_control(finished: FinishedRecipe) -> None:
    comparison = read_json(finished.runs / "report" / "comparison.json")
    assert set(comparison["models"]) == {"base", "teacher", "sft", "distilled"}
