"""The report stage: from a run's folder, from several, and from what is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from tests.evaluation.test_ablation import make_run
from trl_reasoning_distill import cli
from trl_reasoning_distill.scripts import report

FEW = ["--resamples", "200"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, top_k=k, right=r) for name, k, r in (("k5", 5, 30), ("k10", 10, 40))}


def test_a_run_needs_no_more_than_its_folder(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["report", str(runs["k10"]), *FEW])
    said = capsys.readouterr().out
    assert said.startswith("report: distilled 66.7 % vs SFT 33.3 % (+33.3 points [")
    folder = runs["k10"] / "report"
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "report.md",
        "model_card.md",
        "comparison.json",
        "manifest.json",
    }
    assert "Accuracy on held-out problems" in (folder / "report.html").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"evaluation", "training.sft", "training.distilled"}
    cli.main(["report", str(runs["k10"]), *FEW])
    assert "nothing to do" in capsys.readouterr().out


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", *map(str, runs.values()), "--output_dir", str(tmp_path / "out"), *FEW]
    cli.main([*words, "--dry_run"])
    assert "would compare 2 runs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    cli.main(words)
    assert "2 settings; best k10, +33.3 points over sft" in capsys.readouterr().out
    assert "k5" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_named_one_by_one(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "report.yaml"
    run = runs["k5"]
    config.write_text(
        f"evaluation: {run / 'evaluate'}\ntraining: {{distilled: {run / 'distill'}}}\noutput_dir: {tmp_path / 'out'}\n"
        "title: Mine\nresamples: 200\n"
    )
    report.main(["--config", str(config)])
    assert "distilled 50.0 % vs SFT 33.3 %" in capsys.readouterr().out
    assert "<title>Mine</title>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--output_dir", "out"], 2, "evaluation is missing"),
        (["runs/a", "--evaluation", "x"], 2, "give either the runs or the others"),
        (["runs/a", "runs/b"], 2, "output_dir is missing"),
        (["runs/a"], 1, "No folder runs/a"),
        (["--evaluation", "nowhere", "--output_dir", "out"], 1, "Not there: nowhere/predictions.jsonl"),
        (["--evaluation", "x", "--output_dir", "o", "--student", "sft"], 2, "four different names"),
        (["--evaluation", "x", "--output_dir", "o", "--training", "sft"], 2, "write each as name=folder"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report.main(words)
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
