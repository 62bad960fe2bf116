"""`verify` and `select` from a generate folder: files, counts, result line, what was done is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import read_json, read_jsonl, write_jsonl
from trl_reasoning_distill.data.manifest import StageRun, read_manifest
from trl_reasoning_distill.scripts import select, verify


def trace(problem: str, sample: int, final: str, **changes: Any) -> dict[str, Any]:
    row = {
        "problem_id": problem, "sample": sample, "question": f"{problem}?", "gold_answer": "4", "finish_reason": "stop", "num_tokens": 9,
        "completion": f"<think>\nby {sample}\n</think>\n\n{final}", "model": "m", "seed": sample, "kind": "k", "source": "s",
    }  # fmt: skip
    return row | changes


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    folder = tmp_path / "generate"
    rows = [trace("p", 0, "5"), trace("p", 1, "4"), trace("p", 2, "4.0"), trace("q", 0, "\\frac{8}{2}"), trace("q", 1, "4", finish_reason="length"),
            trace("r", 0, "no idea"), trace("r", 1, "4", gold_answer=None)]  # fmt: skip
    with StageRun("generate", folder, {"response_format": "think"}) as run:
        write_jsonl(folder / "traces.jsonl", rows)
        run.finish({}, "")
    return folder


def run_verify(generated: Path, output: Path, *options: str) -> None:
    verify.main(["--traces", str(generated), "--output_dir", str(output), *options])


def test_verify_writes_verdicts_and_training_rows(
    generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "verify"
    run_verify(generated, output)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == "verify: 4 of 7 traces correct (57.1%), 1 undecided; 2 problems kept of 3; left out: 1 cut"
    verdicts = list(read_jsonl(output / "verdicts.jsonl"))
    assert [(row["problem_id"], row["sample"], row["status"]) for row in verdicts] == [
        ("p", 0, "incorrect"), ("p", 1, "correct"), ("p", 2, "correct"), ("q", 0, "correct"), ("q", 1, "correct"), ("r", 0, "incorrect"), ("r", 1, "undecided"),
    ]  # fmt: skip
    rows = list(read_jsonl(output / "train.jsonl"))
    assert [(row["problem_id"], row["pass_rate"]) for row in rows] == [("p", 2 / 3), ("q", 1.0)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "p?"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "<think>\nby 1\n</think>\n\n4"}]
    manifest = read_manifest(output)
    assert (manifest.counts["correct"], manifest.counts["rows"], manifest.stage) == (4, 2, "verify")

    before = (output / "train.jsonl").stat().st_mtime_ns
    run_verify(generated, output)
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "train.jsonl").stat().st_mtime_ns == before


def test_a_report_of_shares(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_verify(generated, tmp_path / "verify")
    printed = capsys.readouterr().out
    assert "correct 57.1% · incorrect 28.6% · undecided 14.3%" in printed
    assert "whole 100.0% (57% right)" in printed
    summary = read_json(tmp_path / "verify" / "summary.json")
    assert summary["rule"] == {"whole": {"traces": 7, "correct": 4, "incorrect": 2, "undecided": 1}}
    assert sum(group["traces"] for group in summary["method"].values()) == 7
    assert {row["rule"] for row in read_jsonl(tmp_path / "verify" / "verdicts.jsonl")} == {"whole"}


def test_where_rules_disagree_examples_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finals = ["The answer is 5. So \\boxed{4}"] * 7 + ["\\boxed{4.0} The answer is 4."]
    rows = [trace(f"p{number}", 0, final) for number, final in enumerate(finals)]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    verify.main(
        [
            "--traces",
            str(tmp_path / "traces.jsonl"),
            "--response_format",
            "think",
            "--output_dir",
            str(tmp_path / "verify"),
        ]
    )
    disagreements = read_json(tmp_path / "verify" / "summary.json")["disagreements"]
    assert list(disagreements) == ["boxed, not answer_is"]
    kind = disagreements["boxed, not answer_is"]
    assert (kind["traces"], kind["correct"], len(kind["examples"])) == (7, 7, 5)
    assert kind["examples"][0] | {"boxed": "4", "answer_is": "5", "gold_answer": "4"} == kind["examples"][0]
    printed = capsys.readouterr().out
    assert "boxed, not answer_is: 7 traces, 7 right" in printed
    assert printed.count("p0/0: boxed '4', answer_is '5', gold answer '4'") == 1


def test_a_stopped_run_goes_on(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 3)
    verify_chunk, seen = verify._verify_chunk, []

    def stop_at_the_second(chunk: Any, *others: Any) -> Any:
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append([(trace.problem_id, trace.sample) for trace in chunk])
        return verify_chunk(chunk, *others)

    monkeypatch.setattr(verify, "_verify_chunk", stop_at_the_second)
    output = tmp_path / "verify"
    with pytest.raises(SystemExit):
        run_verify(generated, output)
    with open(output / "verdicts.partial.jsonl", "a") as handle:
        handle.write('{"problem_id": "to')  # torn by the kill
    assert not (output / "verdicts.jsonl").exists()
    monkeypatch.setattr(
        verify, "_verify_chunk", lambda chunk, *others: seen.append(len(chunk)) or verify_chunk(chunk, *others)
    )
    run_verify(generated, output, "--verify_workers", "1")
    assert seen == [[("p", 0), ("p", 1), ("p", 2)], 3, 1]
    assert not (output / "verdicts.partial.jsonl").exists()
    run_verify(generated, tmp_path / "at_once")
    assert (output / "verdicts.jsonl").read_text() == (tmp_path / "at_once" / "verdicts.jsonl").read_text()
    assert (output / "train.jsonl").read_text() == (tmp_path / "at_once" / "train.jsonl").read_text()


def test_select_selects_again(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_verify(generated, tmp_path / "verify")
    output = tmp_path / "select"
    options = ["--strategy", "all", "--target_format", "boxed", "--system_prompt", ""]
    select.main(["--verified", str(tmp_path / "verify"), "--output_dir", str(output), *options])
    assert "2 problems kept of 3 (3 rows)" in capsys.readouterr().out
    rows = list(read_jsonl(output / "train.jsonl"))
    assert rows[1]["completion"][0]["content"] == "by 2\n\n\\boxed{4.0}"
    assert len(rows[0]["prompt"]) == 1


def test_dry_run_writes_nothing(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_verify(generated, tmp_path / "verify", "--dry_run")
    assert "7 traces" in capsys.readouterr().out
    assert not (tmp_path / "verify").exists()


def test_only_the_first_process_works(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run_verify(generated, tmp_path / "verify")
    assert not (tmp_path / "verify").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "best"], "there are"),
        (["--target_format", "thnk"], "Did you mean 'think'"),
        (["--verify_timeout", "0"], "`verify_timeout=0.0`: must be a number > 0"),
        (["--fuzzy", "0"], "`fuzzy=0.0`: must be a number > 0 and ≤ 100"),
        (["--stratgy", "first"], "Did you mean '--strategy'"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], message: str, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_verify(generated, tmp_path / "verify", *options)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_nothing_to_train_on_says_why(generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_verify(generated, tmp_path / "verify", "--response_format", "gsm8k")
    error = capsys.readouterr().err
    assert "set response_format" in error
    assert "malformed" in error
    assert not (tmp_path / "verify" / "manifest.json").exists()
    run_verify(generated, tmp_path / "other")
    verdicts = (tmp_path / "other" / "verdicts.jsonl").read_text()
    assert (tmp_path / "verify" / "verdicts.jsonl").read_text().count("\n") == verdicts.count("\n"), (
        "they were not in vain"
    )
