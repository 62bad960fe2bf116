"""`gsm8k_topk` really runs, from GSM8K-shaped files to the report, with the quickstart's small models in place of Qwen's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.running import TRAINING, WAYS, FinishedRecipe, copy_recipe
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.data.files import read_json, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.teacher.store import TopKStore

STAGES = ("data", "generate", "verify", "sft", "sft_control", "capture", "distill", "evaluate", "report")


@pytest.fixture(scope="module", params=WAYS)
def finished(
    request: pytest.FixtureRequest, repository: Path, quickstart_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRecipe:
    folder = tmp_path_factory.mktemp("gsm8k_topk")
    for split, count in (("train", 12), ("test", 6)):
        problems = load_problems("synthetic_arithmetic", split=split, limit=count)
        rows = [{"question": p.question, "answer": f"{p.solution}\n#### {p.answer}"} for p in problems]
        write_jsonl(folder / "copies" / "gsm8k" / f"{split}.jsonl", rows)
    teacher, student = (str(quickstart_models / role) for role in ("teacher", "student"))
    asked = {"response_format": "think", "system_prompt": "", "max_new_tokens": 96}
    training: dict[str, Any] = TRAINING | {"reasoning_format": "think"}
    evaluate = read_config(repository / "recipes" / "gsm8k_topk" / "evaluate.yaml")
    overrides = {
        "data": {"mixture": {"gsm8k": {"count": 12, "split": "train"}}, "data_dir": "copies", "tokenizer": student, "response_format": "think"},
        "generate": asked | {"teacher": teacher, "num_samples": 2},
        "sft": training | {"model_name_or_path": student},
        "sft_control": training,
        "capture": {"teacher": teacher},
        "distill": training,
        "evaluate": asked | {"models": evaluate["models"] | {"base": student, "teacher": teacher}, "data_dir": "copies"},
        "report": {"resamples": 200},
    }  # fmt: skip
    return request.param(copy_recipe(repository / "recipes" / "gsm8k_topk", folder, overrides))


def test_every_stage_runs_in_order_and_leaves_a_manifest(finished: FinishedRecipe) -> None:
    places = [finished.output.index(f"[{number}/9] {stage}: done in") for number, stage in enumerate(STAGES, start=1)]
    assert places == sorted(places)
    assert all(read_manifest(finished.runs / stage).status == "finished" for stage in STAGES)
    assert finished.output.rstrip().endswith("report: runs/gsm8k_topk/report/report.html")


def test_one_right_solution_per_problem_is_kept(finished: FinishedRecipe) -> None:
    answers = {row["id"]: row["answer"] for row in finished.rows("data/problems.jsonl")}
    assert len(answers) == 12
    kept = finished.rows("verify/train.jsonl")
    assert len({row["problem_id"] for row in kept}) == len(kept) >= 6
    assert all(row["answer"] == answers[row["problem_id"]] and 0 < row["pass_rate"] <= 1 for row in kept)
    verdicts = finished.rows("verify/verdicts.jsonl")
    assert {row["sample"] for row in verdicts} >= {0, 1}


def test_the_teachers_top_25_are_stored_and_its_top_10_taught(finished: FinishedRecipe) -> None:
    store = TopKStore.open(finished.runs / "capture")
    assert (store.top_k, store.temperatures, store.rows) == (25, (1.0, 2.0), len(finished.rows("verify/train.jsonl")))
    config = read_manifest(finished.runs / "distill").config
    expected = {
        "kd_top_k": 10,
        "kd_temperature": 2.0,
        "kd_weight": 0.35,
        "kd_support": "renormalized",
        "learning_rate": 5e-6,
    }
    assert {key: config[key] for key in expected} == expected


def test_the_control_takes_the_steps_and_tokens_of_the_distilled_model_from_the_same_start(
    finished: FinishedRecipe,
) -> None:
    control, distilled = (read_manifest(finished.runs / stage) for stage in ("sft_control", "distill"))
    for count in ("steps", "rows", "supervised_tokens_seen", "tokens_seen"):
        assert control.counts[count] == distilled.counts[count], count
    assert control.inputs["model_name_or_path"]["hash"] == distilled.inputs["model_name_or_path"]["hash"]
    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "max_length", "num_train_epochs")
    assert {key: control.config[key] for key in same} == {key: distilled.config[key] for key in same}


def test_the_report_compares_all_five_models(finished: FinishedRecipe) -> None:
    comparison = read_json(finished.runs / "report" / "comparison.json")
    assert set(comparison["models"]) == {"base", "teacher", "sft_first", "sft", "distilled"}
    assert all(model["n"] == 6 for model in comparison["models"].values())
    assert "distilled_vs_sft" in comparison["paired"]
