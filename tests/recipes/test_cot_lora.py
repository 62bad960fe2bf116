"""`cot_lora` really runs: raw questions with and without answers, a local teacher, LoRA, predictions and accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.running import TRAINING, WAYS, FinishedRecipe, copy_recipe
from trl_reasoning_distill.data.files import read_json, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.sources import load_problems

STAGES = ("generate", "verify", "sft", "evaluate", "report")


@pytest.fixture(scope="module", params=WAYS)
def finished(
    request: pytest.FixtureRequest, repository: Path, quickstart_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRecipe:
    folder = tmp_path_factory.mktemp("cot_lora")
    questions = load_problems("synthetic_arithmetic", limit=10)
    raw = [{"question": p.question} | ({"answer": p.answer} if index % 2 else {}) for index, p in enumerate(questions)]
    write_jsonl(folder / "data" / "raw_questions.jsonl", raw)
    test = load_problems("synthetic_arithmetic", split="test", limit=5)
    write_jsonl(folder / "data" / "test_questions.jsonl", [{"question": p.question, "answer": p.answer} for p in test])
    teacher, student = (str(quickstart_models / role) for role in ("teacher", "student"))
    asked = {"response_format": "think", "system_prompt": "", "max_new_tokens": 96, "quantization": None}
    overrides = {
        "generate": asked | {"teacher": teacher},
        "sft": TRAINING | {"model_name_or_path": student, "reasoning_format": "think", "load_in_4bit": False},
        "evaluate": asked | {"models": {"base": student, "teacher": teacher, "sft": "runs/cot_lora/sft/final_model"}},
        "report": {"resamples": 200},
    }
    return request.param(copy_recipe(repository / "recipes" / "cot_lora", folder, overrides))


def test_every_stage_runs_in_order_and_leaves_a_manifest(finished: FinishedRecipe) -> None:
    places = [finished.output.index(f"[{number}/5] {stage}: done in") for number, stage in enumerate(STAGES, start=1)]
    assert places == sorted(places)
    assert all(read_manifest(finished.runs / stage).status == "finished" for stage in STAGES)


def test_wrong_answers_are_left_out_and_questions_without_an_answer_are_kept(finished: FinishedRecipe) -> None:
    verdicts = {row["problem_id"]: row for row in finished.rows("verify/verdicts.jsonl")}
    kept = {row["problem_id"]: row for row in finished.rows("verify/train.jsonl")}
    assert len(verdicts) == 10
    assert len(kept) >= 6, "the teacher solves nine of ten problems"
    assert any(row["answer"] is None for row in kept.values())
    for problem_id in kept:
        verdict = verdicts[problem_id]
        assert verdict["status"] == ("undecided" if verdict["gold_answer"] is None else "correct")


def test_the_student_is_an_adapter_of_rank_8_and_its_answers_are_counted(finished: FinishedRecipe) -> None:
    adapter = read_json(finished.runs / "sft" / "final_model" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (8, 16, 0.05)
    assert set(adapter["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    predictions = finished.rows("evaluate/predictions.jsonl")
    assert {(row["model"]) for row in predictions} == {"base", "teacher", "sft"}
    metrics = read_json(finished.runs / "evaluate" / "metrics.json")
    for name, model in metrics["models"].items():
        right = sum(row["status"] == "correct" for row in predictions if row["model"] == name)
        assert (model["n"], model["correct"]) == (5, right)
