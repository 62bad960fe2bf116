"""The data stage: what `prepare` writes is what later stages read, and `preview` shows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.row_sets import load_rows
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.scripts import data


def test_the_stage_writes_problems_that_load_again_and_rows_to_train_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    own = tmp_path / "own.jsonl"
    write_jsonl(own, [{"question": "1+1?", "answer": "2"}, {"question": " "}])
    output = tmp_path / "data"
    arguments = [
        "--mixture",
        f'{{"gsm8k": 5, "{own}": 2}}',
        "--output_dir",
        str(output),
        "--data_dir",
        str(shared_data),
    ]
    arguments += ["--tokenizer", str(shared_data / "models" / "stories260K"), "--response_format", "gsm8k"]
    data.main(["prepare", *arguments])
    out = capsys.readouterr().out
    assert "data: 6 problems of 2 sources, 5 training rows; left out: 1 bad_row" in out
    assert "decontaminated against: gsm8k:test (1,319), gsm_hard:test (1,319), svamp:test (1,000)" in out
    assert "fit 1,024" in out
    assert "\n#### " in out, "the preview shows the rows as they are trained on"
    again = load_problems(str(output))
    assert Counter(problem.source for problem in again) == {"gsm8k": 5, "own": 1}
    assert [problem.to_row() for problem in again] == list(read_jsonl(output / "problems.jsonl"))
    for row, problem in zip(read_jsonl(output / "train.jsonl"), [p for p in again if p.solution], strict=True):
        assert (row["problem_id"], row["answer"]) == (problem.id, problem.answer)
        assert row["completion"][0]["content"] == f"{problem.solution}\n#### {problem.answer}"
    assert [row["answer"] for row in load_rows(output)] == [problem.answer for problem in again if problem.solution]
    (rejected,) = read_jsonl(output / "rejected.jsonl")
    assert rejected["reason"] == "the question is empty"
    assert rejected["row"] == {"question": " "}
    manifest = read_manifest(output)
    assert (manifest.counts["gsm8k"], manifest.counts["bad_row"], manifest.counts["rows"]) == (5, 1, 5)
    data.main(arguments)
    assert "nothing to do" in capsys.readouterr().out


def test_preview_of_a_mixture_and_of_a_stages_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    words = ["--data_dir", str(shared_data), "--decontaminate", "none", "--deduplicate", "exact"]
    data.main(["preview", "--mixture", '{"svamp": 7}', *words, "--chart", str(tmp_path / "chart.svg")])
    out = capsys.readouterr().out
    assert "svamp" in out
    assert "characters in all" in out
    assert (tmp_path / "chart.svg").is_file()
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "q", "completion": "the reply", "source": "mine"}])
    data.main(["preview", "--dataset", str(tmp_path)])
    assert "the reply" in capsys.readouterr().out
    for arguments in (
        ["look"],
        ["prepare", "--mixture", '{"svamp": 1}'],
        ["preview"],
        ["preview", "--dataset", "x", "--mixture", '{"svamp": 1}'],
    ):
        with pytest.raises(SystemExit) as exit_:
            data.main(arguments)
        assert exit_.value.code == 2
