"""Public reports of rows that trained the wrong text, each through `sft --dry_run`; and rows of our own through every stage that reads rows."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.sources import read_source
from trl_reasoning_distill.scripts import capture, data, sft

QUIET = ("--dry_run", "--bf16", "false", "--report_to", "none")


def reports(shared_data: Path) -> list[dict[str, Any]]:
    path = shared_data / "reports" / "data.jsonl"
    if not path.is_file():
        pytest.skip(f"no public reports at {path}")
    return [case for line in path.open(encoding="utf-8") if (case := json.loads(line))["template"]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """`run(stage, *words)`: what a stage prints, whether it ends well or not; a traceback fails the test."""

    def call(stage: Any, *words: str) -> str:
        with contextlib.suppress(SystemExit):
            stage.main([*words, "--output_dir", str(tmp_path / "out")])
        printed = capsys.readouterr()
        return printed.out + printed.err

    return call


def words_of(case: dict[str, Any], shared_data: Path, student: Path) -> list[str]:
    folder = shared_data / "reports" / "data"
    name = case["template"]
    template = folder / name if name.endswith(".jinja") else shared_data / "chat_templates" / f"{name}.jinja"
    return [
        *("--model_name_or_path", str(student), "--dataset_path", str(folder / case["file"])),
        *("--chat_template_path", str(template), *QUIET, *case["extra"]),
    ]


def check(case: dict[str, Any], text: str) -> None:
    assert [part for part in case["must_hold"] if part not in text] == [], f"{case['id']}: {case['right']}\n{text}"
    assert [part for part in case["must_not_hold"] if part in text] == [], f"{case['id']}: {case['right']}\n{text}"


def test_public_reports(run: Callable[..., str], shared_data: Path, quickstart_models: Path) -> None:
    for case in reports(shared_data):
        check(case, run(sft, *words_of(case, shared_data, quickstart_models / "student")))


@pytest.mark.slow
def test_public_reports_from_the_command_line(shared_data: Path, quickstart_models: Path, tmp_path: Path) -> None:
    for case in reports(shared_data):
        words = [*words_of(case, shared_data, quickstart_models / "student"), "--output_dir", str(tmp_path / "out")]
        command = [sys.executable, "-m", "trl_reasoning_distill.cli", "sft", *words]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        check(case, ran.stdout + ran.stderr)


def test_reported_sources(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "reports" / "data"
    if not folder.is_dir():
        pytest.skip(f"no public reports at {folder}")
    for name, split, file in (("math", "train", "math_train.jsonl"), ("aime", "2025", "aime_2025.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{split}.jsonl").write_bytes((folder / file).read_bytes())
    math = read_source("math", split="train", data_dir=str(tmp_path)).problems
    aime = read_source("aime", split="2025", data_dir=str(tmp_path)).problems
    assert [problem.answer for problem in math] == ["2", "\\text{(B)}", "3", "1, 2", "\\frac12", "\\frac12"]
    assert [problem.answer for problem in aime] == ["70", "336", "33", "33", "70", "588", "16"]


THOUGHT = "one and two make three"
ROWS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": f"<think>\n{THOUGHT}\n</think>\n\n3"}]},
    "reasoning_content": {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3", "reasoning_content": THOUGHT}]},
    "alpaca": {"instruction": "Add.", "input": "1+2?", "output": f"<think>\n{THOUGHT}\n</think>\n\n3"},
    "s1k": {"question": "1+2?", "thinking_trajectories": [THOUGHT], "attempt": "3"},
}  # fmt: skip
MALFORMED = {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "<think>\nnever"}]}


@pytest.mark.parametrize("shape", ROWS)
def test_every_stage_reads_published_rows(
    shape: str, run: Callable[..., str], tmp_path: Path, quickstart_models: Path
) -> None:
    rows = tmp_path / "mine.jsonl"
    write_jsonl(rows, [ROWS[shape], MALFORMED, {"messages": [{"role": "user", "content": "?"}]}])
    student = str(quickstart_models / "student")
    for text in (
        run(sft, "--model_name_or_path", student, "--dataset_path", str(rows), *QUIET),
        run(capture, "--teacher", student, "--dataset", str(rows), "--dry_run"),
    ):
        assert f"⟦<think>\n{THOUGHT}\n</think>\n\n3" in text
        assert "1 × the conversation ends with a turn of user: there is no reply to learn (row 3)" in text
        assert "1 with a malformed thought" in text
    assert THOUGHT in run(data, "preview", "--dataset", str(rows))


def test_malformed_thoughts_are_listed_or_trained_if_asked(
    run: Callable[..., str], tmp_path: Path, quickstart_models: Path
) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [ROWS["alpaca"], MALFORMED])
    words = [
        "--model_name_or_path",
        str(quickstart_models / "student"),
        "--dataset_path",
        str(tmp_path / "mine.jsonl"),
        *QUIET,
    ]
    assert (
        "left out: 1 with a malformed thought (the thought never ends: there is no </think>: row 2), 0 too long"
        in run(sft, *words)
    )
    assert "train rows: 2 rows" in run(sft, *words, "--malformed_thoughts", "train")
