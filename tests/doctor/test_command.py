"""The doctor on a healthy recipe, and on one with every sickness it knows."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_reasoning_distill import cli
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.manifest import StageRun
from trl_reasoning_distill.doctor.command import main
from trl_reasoning_distill.doctor.hazards import check_template
from trl_reasoning_distill.doctor.stages import ExaminedStage, Resources, count_rows, options_of
from trl_reasoning_distill.pipeline import read_recipe
from trl_reasoning_distill.scripts import STAGES
from trl_reasoning_distill.shipped import copy_recipe

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the quickstart to make sick."""
    monkeypatch.chdir(tmp_path)
    return copy_recipe("quickstart", Path("mine"))


def change(recipe: Path, stage: str, **options: Any) -> None:
    path = recipe / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | options))


def examine(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = 0
    try:
        main([str(recipe), "--json", *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, json.loads(capsys.readouterr().out)


def messages(found: dict[str, Any], level: str) -> str:
    return "\n".join(f"{item['stage']}: {item['message']}" for item in found["findings"] if item["level"] == level)


def test_a_healthy_recipe_is_green_and_its_steps_are_right(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(recipe, capsys)
    assert code == 0
    assert not messages(found, "red")
    assert not messages(found, "yellow")
    assert "one tokenizer" in messages(found, "green")
    assert found["stages"]["sft"]["steps"] == 15 * 63, "1,000 rows at most, 16 per step, 15 epochs"
    assert found["stages"]["sft"]["is_assumed"]


def test_the_table_names_every_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", str(recipe), "--card", "l4"])
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in ("generate", "sft", "capture", "distill", "evaluate"))
    assert "cheapest that fits: single_gpu on 1" in text


def test_rows_that_exist_are_counted_and_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "1 + 1 ?"}], "completion": [{"role": "assistant", "content": "2 " * n}]}
        for n in [3] * 8 + [400] * 2
    ]
    with StageRun("verify", recipe.parent / "runs/mine/verify", {}) as run:
        write_jsonl(run.output_dir / "train.jsonl", rows)
        run.finish({}, "")
    code, found = examine(recipe, capsys)
    assert code == 0
    assert found["stages"]["sft"]["rows"] == 8, "those that are trained on"
    assert not found["stages"]["sft"]["is_assumed"]
    assert "sft: 2 of 10 rows are longer than max_length, and would be left out" in messages(found, "yellow")


def test_rows_are_followed_from_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    stages = [ExaminedStage(item, Path("runs/gsm8k_topk")) for item in read_recipe(Path("recipes/gsm8k_topk"))]
    rows = count_rows(stages, {})
    assert {rows[name] for name in ("data", "generate", "verify", "sft", "capture", "distill")} == {7473}
    assert rows["evaluate"] is None


def test_every_sickness_is_seen(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(recipe, "generate", source="gsm8k", split="test", source_options=None)
    change(recipe, "evaluate", source="gsm8k", split="test", source_options=None)
    change(recipe, "sft", eval_strategy="epoch", num_train_epochs=3)
    change(recipe, "distill", trust_remote_code=True)
    template = recipe / "models/student/chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ eos_token }}"
    )  # as DeepSeek-R1's does
    code, found = examine(recipe, capsys)
    assert code == 1
    red, yellow = messages(found, "red"), messages(found, "yellow")
    assert "evaluate: tests on gsm8k, split 'test': the very problems that are trained on" in red
    assert "sft: eval_strategy=epoch without evaluation rows: give eval_share or eval_path" in red
    assert "sft: the chat template drops or doubles <think>" in red
    assert "distill: the SFT control differs in num_train_epochs" in yellow
    assert "trust_remote_code is on" in yellow


def test_another_tokenizer_without_align_is_red(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = recipe / "models/other"
    shutil.copytree(recipe / "models/student", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    names = list(tokenizer.get_vocab())
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    first, second = [name for name in names if name in vocabulary][-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    change(recipe, "distill", model_name_or_path=str(other))
    code, found = examine(recipe, capsys)
    assert code == 1
    assert "add the stage align" in messages(found, "red")


def test_the_doctor_reads_only_options_that_exist(recipe: Path) -> None:
    (item,) = (item for item in read_recipe(recipe) if item.name == "sft")
    stage = ExaminedStage(item, Path("runs/mine"))
    assert stage.get("eval_share") == 0.0
    assert stage.get("store_top_k") is None, "another stage's"
    with pytest.raises(KeyError, match="eval_dataset"):
        stage.get("eval_dataset")
    names = {option for script in STAGES for option in options_of(script)}
    for path in (REPOSITORY / "trl_reasoning_distill" / "doctor").glob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        called = {call.args[0].value for call in calls if _is_get(call)}
        assert called <= names | {"count", "prompt", "scaling"}, path  # of an entry of a mixture, a row, and a table


def _is_get(call: ast.Call) -> bool:
    is_get = (isinstance(call.func, ast.Attribute) and call.func.attr == "get") or (isinstance(call.func, ast.Name) and call.func.id == "get")  # fmt: skip
    return is_get and bool(call.args) and isinstance(call.args[0], ast.Constant)


def test_what_a_stage_refuses_is_red_in_its_own_words(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(recipe, "generate", source="nothing")
    change(recipe, "capture", store_top_k=0)
    code, found = examine(recipe, capsys)
    assert code == 1
    assert "generate: Unknown source 'nothing'" in messages(found, "red")
    assert "capture: `store_top_k=0`: must be a whole number ≥ 1." in messages(found, "red")


def test_an_unknown_option_is_red_and_a_model_that_cannot_be_had_is_yellow(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(recipe, "sft", learning_rat=1e-4)
    change(recipe, "generate", teacher="nobody/has-this-model")
    code, found = examine(recipe, capsys)
    assert code == 1
    assert "Did you mean 'learning_rate'?" in messages(found, "red")
    assert "nobody/has-this-model" in messages(found, "yellow")


def test_what_does_not_fit_is_red_with_what_would(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(recipe, capsys, "--card", "0.5")
    assert code == 1
    assert "does not fit" in messages(found, "red")
    assert examine(recipe, capsys, "--card", "h100")[0] == 0


def test_strict_leaves_with_3_for_yellow(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(recipe, "distill", trust_remote_code=True)
    assert examine(recipe, capsys)[0] == 0
    assert examine(recipe, capsys, "--strict")[0] == 3


@pytest.mark.parametrize(
    ("words", "message"), [(["--card", "h999"], "Unknown card"), (["--accelerate_config", "zero9"], "zero9")]
)
def test_a_typo_is_a_line(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(recipe), *words])


def test_a_teacher_on_a_server_needs_no_memory_here_and_its_missing_key_is_yellow(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    options = {"engine": "openai", "base_url": "http://there/v1", "api_key_env": "MY_KEY"}
    server = {"model": "big", **options}
    change(recipe, "generate", teacher="big", **options)
    change(recipe, "capture", teacher="big", **options, teacher_tokenizer="mine/models/teacher", temperatures=[1.0])
    models = yaml.safe_load((recipe / "evaluate.yaml").read_text())["models"]
    change(recipe, "evaluate", models=models | {"teacher": server})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # the client need not be installed here
    _, found = examine(recipe, capsys, "--card", "l4")
    assert found["stages"]["generate"]["memory"] is None
    assert found["stages"]["capture"]["memory"] is None
    assert found["stages"]["capture"]["disk"] > 0
    assert found["stages"]["evaluate"]["memory"] is not None, "the other models are loaded"
    for stage, role in (("generate", "teacher"), ("capture", "teacher"), ("evaluate", "teacher")):
        assert f"{stage}: {role} is big at http://there/v1" in messages(found, "green")
        assert f"{stage}: $MY_KEY is not set" in messages(found, "yellow")
    monkeypatch.setenv("MY_KEY", "k")
    assert "MY_KEY" not in messages(examine(recipe, capsys)[1], "yellow")


def test_test_problems_in_the_training_data_are_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no problem of generate stands in synthetic_arithmetic" in messages(examine(recipe, capsys)[1], "green")
    asked = [{"id": f"{n}", "question": f"Tom buys {n} apples at two dollars each and pays with a fifty: how much is left?", "answer": "1"} for n in range(9)]  # fmt: skip
    for name, rows in (("train", asked[:6]), ("test", [{**row, "question": row["question"] + " Tell!"} for row in asked[4:]])):  # fmt: skip
        write_jsonl(recipe / f"{name}.jsonl", rows)
    for stage, file in (("generate", "train"), ("evaluate", "test")):
        change(recipe, stage, source=str(recipe / f"{file}.jsonl"), split=None, source_options=None)
    code, found = examine(recipe, capsys)
    assert code == 1
    assert "evaluate: 6 problems of generate stand in mine/test.jsonl" in messages(found, "red"), "13 words are theirs"


def test_a_preset_is_an_adapter_and_a_live_teacher_takes_memory(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    whole = examine(recipe, capsys)[1]["stages"]["sft"]["memory"]
    change(recipe, "sft", lora_preset="cot_lora")
    adapter = examine(recipe, capsys)[1]["stages"]["sft"]["memory"]
    assert 0 < adapter["optimizer"] < whole["optimizer"] / 5
    copy_recipe("quickstart_gkd", Path("live"))
    names = {"model_name_or_path": "mine/models/student", "teacher": "mine/models/teacher"}
    change(Path("live"), "gkd", **names)
    teacher = AutoModelForCausalLM.from_pretrained("mine/models/teacher")
    plan = examine(Path("live"), capsys)[1]["stages"]["gkd"]["memory"]
    assert plan["other_model"] == 4 * sum(parameter.numel() for parameter in teacher.parameters())
    change(Path("live"), "gkd", teacher_server_url="http://there/v1", kd_temperature=1.0)
    assert examine(Path("live"), capsys)[1]["stages"]["gkd"]["memory"]["other_model"] == 0


@pytest.mark.parametrize(
    ("name", "options", "level", "message"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", {}, "", ""),
        ("Qwen-Qwen3-0.6B", {}, "", ""),
        ("HuggingFaceTB-SmolLM3-3B", {}, "", ""),
        ("Qwen-QwQ-32B", {}, "red", "closed <think>…</think>"),
        ("Qwen-QwQ-32B", {"enable_thinking": True}, "", ""),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {"enable_thinking": True}, "red", "drops or doubles <think>"),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", {"enable_thinking": True}, "red", "drops or doubles <think>"),
    ],
)
def test_real_templates_are_judged_as_the_trainer_judges_them(
    shared_data: Path, recipe: Path, name: str, options: dict[str, Any], level: str, message: str
) -> None:
    path = shared_data / "chat_templates" / f"{name}.jinja"
    change(recipe, "sft", chat_template_path=str(path), chat_template_kwargs=options or None)
    (item,) = (item for item in read_recipe(recipe) if item.name == "sft")
    found = [
        found for found in check_template(ExaminedStage(item, Path("runs/mine")), Resources()) if found[0] == "red"
    ]
    assert [found_level for found_level, _ in found] == ([level] if level else [])
    assert not level or message in found[0][1]
