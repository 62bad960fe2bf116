"""The quickstart really runs: `trl-distill run` takes a small copy of it through all stages, each launched as a user would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.running import FinishedRecipe, copy_recipe, run_as_a_user, run_in_process
from trl_reasoning_distill.data.files import read_json
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.schema import Problem, Trace
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher.sampling import GenerationRequest, SamplingConfig
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine
from trl_reasoning_distill.teacher.store import TopKStore
from trl_reasoning_distill.verification.verify import verify_answer, verify_answers

STAGES = ("generate", "verify", "sft", "capture", "distill", "evaluate", "report")
MODELS = ("base", "teacher", "sft", "distilled")
SMALLER: dict[str, dict[str, Any]] = {
    "generate": {"limit": 12, "num_samples": 1},
    "sft": {"max_steps": 2},
    "distill": {"max_steps": 2},
    "evaluate": {"limit": 8},
    "report": {"resamples": 200},
}


@pytest.fixture(scope="module")
def finished(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRecipe:
    """The recipe's own YAMLs and models, with fewer problems and steps, run through all stages in their own processes."""
    folder = tmp_path_factory.mktemp("quickstart")
    return run_as_a_user(copy_recipe(repository / "recipes" / "quickstart", folder, SMALLER))


# The first test waits for seven launches, each of which imports torch and transformers.
@pytest.mark.timeout(1800)
def test_every_stage_runs_in_order_and_leaves_a_manifest(finished: FinishedRecipe) -> None:
    places = [finished.output.index(f"[{number}/7] {stage}: done in") for number, stage in enumerate(STAGES, start=1)]
    assert places == sorted(places)
    for stage in STAGES:
        manifest = read_manifest(finished.runs / stage)
        assert (manifest.stage, manifest.status) == (stage, "finished")
        assert manifest.result in finished.output
        assert manifest.counts
        assert manifest.wall_seconds > 0
        local_inputs = [value for value in manifest.inputs.values() if value["path"] != "synthetic_arithmetic"]
        assert local_inputs
        assert all(value["hash"] for value in local_inputs)
        assert not (finished.runs / stage / "run.json").exists()  # the mark of an unfinished stage
    assert finished.output.rstrip().endswith("report: runs/quickstart/report/report.html")


def test_traces_become_verdicts_and_right_ones_training_rows(finished: FinishedRecipe) -> None:
    problems = [Problem.from_row(row) for row in finished.rows("generate/problems.jsonl")]
    traces = [Trace.from_row(row) for row in finished.rows("generate/traces.jsonl")]
    assert len(problems) == 12
    assert [(trace.problem_id, trace.gold_answer) for trace in traces] == [(each.id, each.answer) for each in problems]
    verdicts = finished.rows("verify/verdicts.jsonl")
    assert [row["completion"] for row in verdicts] == [trace.completion for trace in traces]
    assert [row["status"] for row in verdicts] == [verify_answer(t.completion, t.gold_answer).status for t in traces]
    right = [row for row in verdicts if row["status"] == "correct"]
    assert len(right) >= 6, "the teacher solves nine of ten problems"
    kept = finished.rows("verify/train.jsonl")
    assert {row["problem_id"] for row in kept} <= {row["problem_id"] for row in right}
    completions = {row["problem_id"]: row["completion"] for row in right}
    for row in kept:
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert row["completion"][0]["content"] == completions[row["problem_id"]]
        assert ReasoningFormat.preset("think").parse(row["completion"][0]["content"]).well_formed


def test_the_store_holds_a_record_for_every_supervised_token(finished: FinishedRecipe, quickstart_models: Path) -> None:
    store = TopKStore.open(finished.runs / "capture")
    rows = finished.rows("verify/train.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(quickstart_models / "student")
    tokens = [tokenize_example(tokenizer, row) for row in rows]
    assert (store.rows, store.top_k, store.temperatures) == (len(rows), 25, (1.0, 2.0))
    assert len(store) == sum(label != -100 for row in tokens for label in row.labels)
    assert [row.input_ids.tolist() for row in store] == [row.input_ids for row in tokens]


def test_control_and_distilled_took_the_same_steps_and_tokens(
    finished: FinishedRecipe, quickstart_models: Path
) -> None:
    sft, distill = (read_manifest(finished.runs / stage) for stage in ("sft", "distill"))
    assert sft.counts["steps"] == 2
    for count in ("steps", "rows", "supervised_tokens_seen", "tokens_seen"):
        assert sft.counts[count] == distill.counts[count], count
    assert distill.counts["kd_loss"] > 0
    weights = [quickstart_models / "student"] + [finished.runs / stage / "final_model" for stage in ("sft", "distill")]
    base, control, distilled = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in weights)
    for one, other in ((base, control), (base, distilled), (control, distilled)):
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for stage in ("sft", "distill"):
        assert read_json(finished.runs / stage / "trainer_state.json")["log_history"]


def test_the_comparison_says_what_the_predictions_say(finished: FinishedRecipe) -> None:
    predictions = finished.rows("evaluate/predictions.jsonl")
    metrics = read_json(finished.runs / "evaluate" / "metrics.json")
    comparison = read_json(finished.runs / "report" / "comparison.json")
    assert set(metrics["models"]) == set(comparison["models"]) == set(MODELS)
    problems = {name: [row["problem_id"] for row in predictions if row["model"] == name] for name in MODELS}
    assert len(set(problems["base"])) == 8
    assert all(set(ids) == set(problems["base"]) and len(ids) == 8 for ids in problems.values())
    for name in MODELS:
        right = sum(row["status"] == "correct" for row in predictions if row["model"] == name)
        model = comparison["models"][name]
        low, high = model["ci95"]
        assert (model["accuracy"], model["n"]) == (right / 8, 8)
        assert 0 <= low <= right / 8 <= high <= 1
        assert metrics["models"][name]["correct"] == right
    pair = comparison["paired"]["distilled_vs_sft"]
    accuracy = {name: comparison["models"][name]["accuracy"] for name in MODELS}
    assert pair["difference"] == pytest.approx(accuracy["distilled"] - accuracy["sft"])
    assert pair["ci95"][0] <= pair["difference"] <= pair["ci95"][1]
    assert 0 <= pair["p"] <= 1
    gap = accuracy["teacher"] - accuracy["base"]
    expected = (accuracy["distilled"] - accuracy["base"]) / gap if gap > 0 else None
    assert comparison["gap_recovered"] == pytest.approx(expected)


def test_the_report_is_one_page_that_loads_nothing(finished: FinishedRecipe) -> None:
    page = (finished.runs / "report" / "report.html").read_text()
    assert "Quickstart: longer chains of arithmetic" in page
    assert "data:image/" in page or "<svg" in page
    loaded = re.findall(r"""(?:<(?:link|script|img|iframe)[^>]*?(?:href|src)=|@import |url\()["']?([^"')>\s]+)""", page)
    assert all(address.startswith(("data:", "#")) for address in loaded), loaded
    markdown = (finished.runs / "report" / "report.md").read_text()
    for text in (page, markdown):
        assert all(name in text for name in MODELS)


@pytest.mark.timeout(1800)
def test_a_second_run_skips_everything(finished: FinishedRecipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.runs.rglob("*") if path.is_file()}
    output = run_as_a_user(finished.folder / "recipes" / "quickstart").output
    assert [f"[{number}/7] {stage}: done before" in output for number, stage in enumerate(STAGES, 1)] == [True] * 7
    assert output.rstrip().endswith("report: runs/quickstart/report/report.html")
    assert {path: path.stat().st_mtime_ns for path in finished.runs.rglob("*") if path.is_file()} == before


def test_quickstart_gkd_adds_an_arm_with_a_live_teacher(finished: FinishedRecipe, repository: Path) -> None:
    smaller = {"gkd": {"max_steps": 2, "max_new_tokens": 32, "per_device_train_batch_size": 4}, "evaluate": {"limit": 8}, "report": {"resamples": 200}}  # fmt: skip
    copy = copy_recipe(repository / "recipes" / "quickstart_gkd", finished.folder, smaller)
    live = run_in_process(copy)
    manifest = read_manifest(live.runs / "gkd")
    assert (manifest.counts["steps"], manifest.config["lmbda"]) == (2, 0.5)
    assert manifest.counts["kd_loss"] > 0
    comparison = read_json(live.runs / "report" / "comparison.json")
    assert set(comparison["models"]) == {*MODELS, "gkd"}
    assert "distilled_vs_sft" in comparison["paired"]


@pytest.mark.parametrize(("role", "megabytes"), [("teacher", 8), ("student", 2)])
def test_the_models_that_ship_are_small_and_ready_to_chat(quickstart_models: Path, role: str, megabytes: int) -> None:
    folder = quickstart_models / role
    assert sum(path.stat().st_size for path in folder.iterdir()) <= megabytes * 1e6
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked, answered = [{"role": "user", "content": "2+2?"}], {"role": "assistant", "content": "4"}
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([*asked, answered], tokenize=False)
    assert text == f"{prompt}4{tokenizer.eos_token}\n"
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_teacher_and_student_keep_what_their_training_measured(quickstart_models: Path) -> None:
    measured = {
        role: json.loads((quickstart_models / role / "training.json").read_text()) for role in ("teacher", "student")
    }
    assert measured["teacher"]["test_accuracy"] >= 0.8
    assert measured["student"]["test_accuracy"] <= 0.4
    assert all(each["test_problems"] >= 500 for each in measured.values())
    problems = load_problems("synthetic_arithmetic", split="test", limit=24, steps=(2, 3, 4))
    teacher, student = (count_right(quickstart_models / role, problems) for role in ("teacher", "student"))
    assert teacher >= 17
    assert student <= teacher - 6


def count_right(model: Path, problems: list[Problem]) -> int:
    """How many problems a model solves greedily."""
    engine = TransformersEngine.from_pretrained(str(model), device="cpu")
    format_ = ReasoningFormat.preset("think", system_prompt=None)
    requests = [GenerationRequest(problem.id, format_.messages(problem.question)) for problem in problems]
    texts = {request.key: output.text for request, output in engine.generate(requests, SamplingConfig(128))}
    verdicts = verify_answers([texts[problem.id] for problem in problems], [problem.answer for problem in problems])
    return sum(verdict.status == "correct" for verdict in verdicts)


@pytest.mark.timeout(1800)
def test_the_readmes_python_runs_as_it_stands(finished: FinishedRecipe, repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    code = "\n".join(block.partition("```")[0] for block in readme.split("```python\n")[1:])
    assert "max_steps=50" in code
    code = code.replace("max_steps=50", "max_steps=2")
    code += 'CosineTrainer("recipes/quickstart/models/student", args).train()\n'
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished.folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'kd_weight'") == 2, done.stdout  # both trainings log that they distil


LOSS_PREAMBLE = """
import torch
hidden, head = torch.randn(6, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=False)
teacher_hidden, teacher_head = torch.randn(6, 12), torch.nn.Linear(12, 60, bias=False)
labels, tokens = torch.tensor([1, 2, -100, 4, 5, 6]), 5
ids = torch.stack([torch.randperm(50)[:4] for _ in range(6)])
log_probs = torch.full((6, 4), 0.2).log()
"""
ALIGNMENT_PREAMBLE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
student = AutoModelForCausalLM.from_pretrained("recipes/quickstart/models/student")
student_tokenizer = AutoTokenizer.from_pretrained("recipes/quickstart/models/student")
"""
PAGES: dict[str, str] = {
    "docs/concepts/alignment.md": ALIGNMENT_PREAMBLE,
    "docs/concepts/loss.md": LOSS_PREAMBLE,
    "docs/concepts/reasoning-format.md": "",
    "docs/concepts/store-format.md": "",
    "docs/stages/data.md": "",
    "docs/stages/distill.md": "import math\nimport torch\nfrom trl_reasoning_distill import TopKDistillTrainer\n",
    "docs/stages/evaluate.md": "",
    "docs/stages/sft.md": "",
}
"""Pages with Python, and what stands before it when it runs; `verification.md` has tests of its own, and README's are above."""

STAND_INS = {
    "runs/x/capture/store": "runs/x/made/store",
    "Qwen/Qwen2.5-0.5B-Instruct": "recipes/quickstart/models/student",
    "Qwen/Qwen2.5-7B-Instruct": "recipes/quickstart/models/teacher",
    "runs/x/capture": "runs/quickstart/capture",
    'load_problems("gsm8k", split="test")': 'load_problems("synthetic_arithmetic", split="test", limit=2)',
    'load_problems("gsm8k", limit=100)': 'load_problems("synthetic_arithmetic", limit=2)',
    "max_new_tokens=512": "max_new_tokens=64",
    "vocab_size=151_665": "vocab_size=50",
}


@pytest.mark.timeout(1800)
def test_the_pages_python_runs(finished: FinishedRecipe, repository: Path) -> None:
    with_python = {
        str(page.relative_to(repository))
        for page in (repository / "docs").rglob("*.md")
        if "```python" in page.read_text(encoding="utf-8")
    }
    assert with_python - {"docs/concepts/verification.md"} == PAGES.keys()
    program = []
    for name, preamble in PAGES.items():
        page = (repository / name).read_text(encoding="utf-8")
        code = preamble + "\n".join(block.partition("```")[0] for block in page.split("```python\n")[1:])
        for published, here in STAND_INS.items():
            code = code.replace(published, here)
        program.append(f"print({name!r}, flush=True)\nexec(compile({code!r}, {name!r}, 'exec'), {{}})")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=finished.folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
