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
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.scripts import distill, gkd, planning, sft

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
    text = dry_run(distill, teacher_logits=str(store), top_k=4, gradient_accumulation_steps=3, **options)
    assert f"{learnt:,} supervised" in text
    assert "7 steps of 6 rows (2 per device × 1 processes × 3 accumulated)" in text
    assert marked(text) == examples
    teacher = {"teacher_model_name_or_path": str(student), "teacher_context": "few_shot"}
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
    assert "judged" not in dry_run(sft, max_samples=3, **options)
