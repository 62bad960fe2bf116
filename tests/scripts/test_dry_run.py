"""A dry run of each stage: its counts are right, what it marks is what would be learnt, and it writes and loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from tests.trainer import tiny
from trl_reasoning_distill import pipeline
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.manifest import StageRun
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.scripts import (
    align,
    capture,
    data,
    distill,
    evaluate,
    generate,
    gkd,
    planning,
    report,
    select,
    sft,
    verify,
)
from trl_reasoning_distill.scripts import store as store_command
from trl_reasoning_distill.shipped import copy_recipe

TRAINING = {"bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without weights: whoever looks for them fails."""
    path = tmp_path_factory.mktemp("student")
    tiny.make_model().config.save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "rows.jsonl"
    write_jsonl(path, tiny.make_rows(8))
    return path


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`dry_run(stage, **options)`: what the stage prints; it must leave no file and load no weight."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a dry run loads no weights"))

    def start(stage: Any, **options: Any) -> str:
        config = tmp_path / "in" / "options.yaml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps({"output_dir": "out", **options}))
        before = sorted(tmp_path.rglob("*"))
        stage.main(["--config", str(config), "--dry_run"])
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return start


def marked(text: str) -> list[str]:
    """What stands between the marks, of the examples alone."""
    return re.findall("⟦(.*?)⟧", text.replace("⟦…⟧", ""), re.DOTALL)


def tokenized(path: Path, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer, [tokenize_example(tokenizer, row) for row in rows]


def supervised(tokens: Any) -> list[int]:
    return [label for label in tokens.labels if label != -100]


def test_sft_counts_rows_steps_and_tokens(dry_run: Callable[..., str], student: Path, rows: Path) -> None:
    tokenizer, tokens = tokenized(student, tiny.make_rows(8))
    limit = sorted(len(row.input_ids) for row in tokens)[-2] - 1  # two are longer, or as long as the longest
    kept = [row for row in tokens if len(row.input_ids) <= limit]
    text = dry_run(
        sft, model_name_or_path=str(student), dataset_path=str(rows), max_length=limit, num_train_epochs=2.5, **TRAINING
    )
    total, learnt = sum(len(row.input_ids) for row in kept), sum(len(supervised(row)) for row in kept)
    assert f"left out: {8 - len(kept)} too long" in text
    assert f"an epoch: {len(kept)} rows, {total:,} tokens, {learnt:,} supervised" in text
    assert f"{-(-(-(-len(kept) // 2) * 5) // 2)} steps of 2 rows" in text
    assert marked(text) == [tokenizer.decode(supervised(row)) for row in kept[:2]]


def test_distill_finds_its_rows_in_the_store_and_gkd_reads_them_with_its_teacher(
    dry_run: Callable[..., str], student: Path, rows: Path, tmp_path: Path
) -> None:
    tokenizer, tokens = tokenized(student, tiny.make_rows(8))
    store = tiny.make_store(tmp_path / "in" / "store", tiny.make_model(7, vocab_size=272), tokenizer, tiny.make_rows(8))
    options = {"model_name_or_path": str(student), "lora_preset": "cot_lora", "max_steps": 7, **TRAINING}
    learnt = sum(len(supervised(row)) for row in tokens)
    examples = [tokenizer.decode(supervised(row)) for row in tokens[:2]]
    text = dry_run(distill, teacher_logits=str(store), kd_top_k=4, gradient_accumulation_steps=3, **options)
    assert f"{learnt:,} supervised" in text
    assert "7 steps of 6 rows (2 per device × 1 process × 3 accumulated)" in text
    assert marked(text) == examples
    teacher = {"teacher": str(student), "teacher_context": "few_shot"}
    text = dry_run(gkd, dataset_path=str(rows), **teacher, **options)
    assert "rows that the teacher cannot read: 0 with other tokens behind its prompt, 0 too long" in text
    assert marked(text) == examples


def test_many_rows_are_judged_by_a_sample(
    dry_run: Callable[..., str], student: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "DRY_RUN_ROWS", 4)
    options = {"model_name_or_path": str(student), "dataset_path": str(rows), "num_train_epochs": 1, **TRAINING}
    text = dry_run(sft, add_think_tokens=True, **options)
    assert "judged by 4 rows, each for 2.0" in text
    assert "about 8 rows" in text
    assert "4 steps of 2 rows" in text
    assert "judged by" not in dry_run(sft, limit=3, **options)


PROBLEMS = [{"id": f"p{n}", "question": f"{n}+{n}?", "answer": str(2 * n), "source": "mine"} for n in range(4)]


def trace(problem: str, sample: int, completion: str, **changes: Any) -> dict[str, Any]:
    row = {
        "problem_id": problem, "sample": sample, "question": f"{problem}?", "gold_answer": "4", "finish_reason": "stop", "num_tokens": 9,
        "completion": f"<think>\nby {sample}\n</think>\n\n{completion}", "model": "m", "seed": sample,
    }  # fmt: skip
    return row | changes


TRACES = [
    trace("p", 0, "5"),
    trace("p", 1, "4"),
    trace("q", 0, "4", finish_reason="length"),
    trace("r", 0, "?", gold_answer=None),
]


def test_data_shows_what_is_left_out_and_two_rows(dry_run: Callable[..., str], tmp_path: Path) -> None:
    solved = [{**row, "solution": "Twice.", "question": "Say " + row["question"]} for row in PROBLEMS]
    write_jsonl(tmp_path / "in" / "problems.jsonl", [*solved, {**solved[0], "id": "again"}])
    text = dry_run(data, mixture={str(tmp_path / "in" / "problems.jsonl"): 5}, decontaminate=["none"])
    assert text.startswith("data: 4 problems and 4 training rows would be written to out")
    assert "1 duplicate" in text
    assert len([said for said in marked(text) if said.startswith("Say ")]) == 2
    assert sum("Twice." in said for said in marked(text)) == 2


def test_generate_shows_whole_prompts_with_roles(dry_run: Callable[..., str], student: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "problems.jsonl", PROBLEMS)
    options = {"teacher": str(student), "source": str(tmp_path / "in" / "problems.jsonl"), "max_new_tokens": 250}
    text = dry_run(generate, num_samples=3, temperature=1.0, system_prompt="Be brief.", **options)
    assert "asked for 3 samples for each of 4 problems, and write at most 3,000 tokens" in text
    system = "Be brief."
    prompts = [[{"role": "system", "content": system}, {"role": "user", "content": row["question"]}] for row in PROBLEMS]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(student)
    ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in prompts]
    assert f"prompts of {sum(map(len, ids)):,} tokens, the longest {max(map(len, ids))}" in text
    assert "4 leave less than 250 of its 256 tokens to write in" in text
    assert marked(text) == [system, "0+0?", system, "1+1?"]
    assert text.replace(f"system⟦{system}⟧", system).replace("user⟦0+0?⟧", "0+0?").count(tokenizer.decode(ids[0])) == 1
    text = dry_run(generate, engine="openai", base_url="http://nowhere/v1", **options)
    assert "at http://nowhere/v1 renders the prompts itself" in text
    assert marked(text) == ["0+0?", "1+1?"]


def test_evaluate_shows_each_way_of_reading_once(dry_run: Callable[..., str], student: Path, tmp_path: Path) -> None:
    other = tmp_path / "in" / "other"
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(other)
    write_jsonl(tmp_path / "in" / "problems.jsonl", PROBLEMS)
    models = {"base": str(student), "sft": str(student), "other": {"model": str(other), "dtype": "float32"}}
    text = dry_run(evaluate, models=models, source=str(tmp_path / "in" / "problems.jsonl"))
    assert "3 models would each give 1 answers to each of 4 problems" in text
    assert marked(text) == ["0+0?", "1+1?"] * 2
    assert "[user⟦0+0?⟧]" in text
    assert text.count("<|im_start|>assistant") == 2


def test_verify_and_select_show_two_traces_with_gold_and_verdict(dry_run: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "traces.jsonl", TRACES)
    text = dry_run(verify, traces=str(tmp_path / "in"))
    assert "4 traces of 3 problems" in text
    assert "1 have no gold answer, 1 were cut" in text
    assert re.findall(r"--- trace (\w #\d)", text) == ["p #0", "q #0"]
    assert re.findall(r"gold: (\S+); verdict: (\w+)", text) == [("4", "incorrect"), ("4", "correct")]
    verified = [{**row, "status": status, "reasoning_ok": True} for row, status in zip(TRACES, ("incorrect", "correct", "correct", "undecided"), strict=True)]  # fmt: skip
    write_jsonl(tmp_path / "in" / "verdicts.jsonl", verified)
    text = dry_run(select, verified=str(tmp_path / "in"))
    assert "of 4 verified traces" in text
    assert "1 problems kept of 3; left out: 1 cut" in text
    assert re.findall(r"--- trace (\w #\d)", text) == ["p #0", "p #1"]


def test_capture_and_align_mark_the_positions_that_get_a_record(
    dry_run: Callable[..., str], student: Path, rows: Path, tmp_path: Path
) -> None:
    tokenizer, tokens = tokenized(student, tiny.make_rows(8))
    limit = max(len(row.input_ids) for row in tokens) - 1
    kept = [row for row in tokens if len(row.input_ids) <= limit]
    text = dry_run(capture, teacher=str(student), dataset=str(rows), max_length=limit, store_top_k=4)
    read, records = sum(len(row.input_ids) for row in kept), sum(len(supervised(row)) for row in kept)
    assert f"would read {len(kept)} of 8 rows, {read:,} tokens, and leave {records:,} records" in text
    assert f"left out: {8 - len(kept)} too long" in text
    assert marked(text) == [tokenizer.decode(supervised(row)) for row in kept[:2]]

    store = tiny.make_store(tmp_path / "in" / "store", tiny.make_model(7, vocab_size=272), tokenizer, tiny.make_rows(8))
    text = dry_run(align, store=str(store), student=str(student), teacher_tokenizer=str(student))
    assert "100.0% of the supervised positions of the first 8 of 8 rows would have a record" in text
    assert marked(text) == [tokenizer.decode(supervised(row)) for row in tokens[:2]]


def test_capture_shows_what_the_teacher_reads_more(dry_run: Callable[..., str], student: Path, rows: Path) -> None:
    text = dry_run(capture, teacher=str(student), dataset=str(rows), teacher_context="system", teacher_context_system="Be exact.")  # fmt: skip
    assert text.count("system\nBe exact.<|im_end|>") == 2
    tokenizer, tokens = tokenized(student, tiny.make_rows(2))
    assert marked(text) == [tokenizer.decode(supervised(row)) for row in tokens]


def test_store_audit_and_report_say_what_they_would_read(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, tokens = tokenized(student, tiny.make_rows(8))
    store = tiny.make_store(tmp_path / "store", tiny.make_model(7, vocab_size=272), tokenizer, tiny.make_rows(8))
    store_command.main(["audit", str(store), "--teacher", str(student), "--num_rows", "8", "--dry_run"])
    text = capsys.readouterr().out
    assert f"8 of 8 rows again, {sum(len(row.input_ids) for row in tokens):,} tokens" in text
    assert marked(text) == [tokenizer.decode(supervised(row)) for row in tokens[:2]]
    answers = [{"model": m, "problem_id": f"{n}", "status": "correct"} for m in ("base", "sft") for n in range(3)]
    write_jsonl(tmp_path / "evaluate" / "predictions.jsonl", answers)
    report.main(["--evaluation", str(tmp_path / "evaluate"), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    text = capsys.readouterr().out
    assert "evaluation: 3 problems × 1 answers of base, sft; nobody plays teacher, distilled" in text
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_walked_as_far_as_its_inputs_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_recipe("quickstart", Path("mine"))
    walk = ["mine", "--runs_dir", "elsewhere", "--accelerate_config", "cpu", "--dry_run"]
    pipeline.main(walk)
    text = capsys.readouterr().out
    assert "asked for 2 samples for each of 1,000 problems" in text
    assert re.findall(r"^(\w+): .* \(waits for (.*)\)$", text, re.MULTILINE) == [
        ("verify", "generate"), ("sft", "verify"), ("capture", "verify"), ("distill", "verify, capture"), ("evaluate", "sft, distill"),
        ("report", "evaluate, capture, sft, distill"),
    ]  # fmt: skip
    assert not Path("elsewhere").exists()
    with StageRun("verify", "elsewhere/mine/verify", {}, {}) as run:
        write_jsonl(run.output_dir / "train.jsonl", tiny.make_rows(8))
        run.finish({}, "")
    before = sorted(tmp_path.rglob("*"))
    pipeline.main([*walk, "--only", "sft", "capture", "distill"])
    text = capsys.readouterr().out
    assert "15 steps of 16 rows" in text
    assert "would read 8 of 8 rows" in text
    assert len(marked(text)) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_what_data_and_models_write_commands_no_terminal(dry_run: Callable[..., str], tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202e"
    rows = [
        {**row, "problem_id": f"p{hostile}", "question": f"q{hostile}", "answer": f"4{hostile}"} for row in TRACES[:2]
    ]
    write_jsonl(tmp_path / "in" / "traces.jsonl", rows)
    problems = [
        {**row, "id": f"{n}{hostile}", "question": f"{n}{hostile}", "source": f"s{hostile}"}
        for n, row in enumerate(PROBLEMS)
    ]
    write_jsonl(tmp_path / "in" / "problems.jsonl", problems)
    mixture = {str(tmp_path / "in" / "problems.jsonl"): 4}
    for text in (dry_run(verify, traces=str(tmp_path / "in")), dry_run(data, mixture=mixture, decontaminate=["none"])):
        assert not set(text) & set("\x1b\x07\u202e")
        assert "owned" in text
