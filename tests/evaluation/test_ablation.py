"""Several runs on one page: found by themselves, grouped by seed, sorted by effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from tests.evaluation.test_report import Page, assert_self_contained, predictions
from trl_reasoning_distill.data.files import write_json, write_jsonl
from trl_reasoning_distill.data.manifest import StageManifest, StageRun
from trl_reasoning_distill.evaluation.ablation import group_runs, write_ablation_report
from trl_reasoning_distill.evaluation.runs import Run, read_run


def make_run(folder: Path, *, top_k: int, right: int, seed: int = 0, n: int = 60) -> Path:
    """A run whose student is right on the first `right` problems, its control on 20, its base on 6, its teacher on 57."""
    for name in ("sft", "distill"):
        settings = {"output_dir": str(folder / name), "seed": seed} | ({"top_k": top_k} if name == "distill" else {})
        with StageRun(name, folder / name, settings, seed=seed) as stage:
            (folder / name / "final_model").mkdir()
            logged = [{"step": step, "kd_loss": 1 / step, "eval_math_accuracy": 0.1 * step} for step in (1, 2)]
            write_json(folder / name / "trainer_state.json", {"log_history": logged})
            stage.finish({"steps": 2}, f"{name}: 2 steps")
    models = {
        f"models.{name}": folder / stage / "final_model" for name, stage in (("sft", "sft"), ("distilled", "distill"))
    }
    with StageRun("evaluate", folder / "evaluate", {"seed": seed}, models) as stage:
        rows = predictions({"base": 6, "sft": 20, "distilled": right, "teacher": 57}, n)
        write_jsonl(folder / "evaluate" / "predictions.jsonl", rows)
        stage.finish({"problems": n}, f"{n} problems")
    return folder


def test_a_runs_folder_says_what_it_holds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "k10", top_k=10, right=40)
    (folder / "capture" / "store").mkdir(parents=True)
    write_json(folder / "capture" / "store" / "manifest.json", {})
    with StageRun("capture", folder / "capture", {"top_k": 25}) as stage:
        stage.finish({}, "")
    run = read_run(folder)
    assert (run.name, run.evaluation, run.store) == ("k10", folder / "evaluate", folder / "capture" / "store")
    assert run.training == {"sft": folder / "sft", "distilled": folder / "distill"}
    assert run.settings == {
        "distill.top_k": 10,
        "distill.seed": 0,
        "sft.seed": 0,
        "evaluate.seed": 0,
        "capture.top_k": 25,
    }
    with pytest.raises(FileNotFoundError, match="No finished evaluate stage"):
        read_run(folder / "sft")
    with pytest.raises(FileNotFoundError, match="No folder"):
        read_run(tmp_path / "nowhere")


def test_settings_are_sorted_by_effect_and_seeds_are_one_setting(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "k5", top_k=5, right=30),
        make_run(tmp_path / "k10-seed0", top_k=10, right=40),
        make_run(tmp_path / "k10-seed1", top_k=10, right=44, seed=1),
        make_run(tmp_path / "k25", top_k=25, right=18),
    ]
    settings = write_ablation_report(runs, tmp_path / "report", title="K <b>", resamples=500)
    assert [setting.name for setting in settings] == ["k10-seed0", "k5", "k25"]
    assert [setting.varied for setting in settings] == [{"distill.top_k": k} for k in (10, 5, 25)]
    first = settings[0].comparison.paired["distilled_vs_sft"]
    assert (first.difference, first.test, len(settings[0].runs)) == (pytest.approx(22 / 60), "clustered_t", 2)
    assert settings[1].comparison.paired["distilled_vs_sft"].test == "mcnemar_exact"

    text = (tmp_path / "report" / "report.html").read_text()
    assert_self_contained(text)
    told = " ".join(" ".join(Page(text).texts).split()).replace("\N{NO-BREAK SPACE}", " ")
    for expected in (
        "k10-seed0 has the largest effect: +36.7 points",
        "control gap left by control, recovered top_k seeds",
        "Accuracy on held-out problems during",
        "K <b>",
    ):
        assert expected in told, expected
    markdown = (tmp_path / "report" / "report.md").read_text()
    rows = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| k")]
    assert [(row[0], *row[-2:]) for row in rows] == [
        ("| k10-seed0", "10", "2 |"),
        ("| k5", "5", "1 |"),
        ("| k25", "25", "1 |"),
    ]
    plain = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [each["effect"] for each in plain["settings"]] == pytest.approx([22 / 60, 10 / 60, -2 / 60])


def test_an_option_that_some_runs_lack_is_told_only_if_nothing_else_tells_them_apart() -> None:
    def run(name: str, **config: object) -> Run:
        train = StageManifest("distill", "finished", config, {}, {}, "", {}, None, 0, "", 0.0, "", "")
        return Run(name, Path(name), {}, None, {"train": train})

    older, newer, wider = (
        run("older", k=10),
        run("newer", k=10, merge=False, show=3),
        run("w", k=25, merge=False, show=3),
    )
    told = [varied for _, varied in group_runs([run("control", seed=1), older, wider])]
    assert told == [{"train.k": None}, {"train.k": 10}, {"train.k": 25}]
    told = [varied for _, varied in group_runs([older, newer, wider])]
    assert told == [{"train.k": k, "train.merge": merge} for k, merge in ((10, None), (10, False), (25, False))]


def test_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / parent / "run", top_k=5, right=30) for parent in ("a", "b")]
    with pytest.raises(ValueError, match="same name"):
        write_ablation_report(runs, tmp_path / "report")


def test_runs_without_a_control_are_sorted_by_accuracy_and_the_table_is_whole(tmp_path: Path) -> None:
    runs = []
    for k, right in ((5, 30), (10, 40)):
        folder = tmp_path / f"k{k}"
        with StageRun("distill", folder / "train", {"top_k": k}) as stage:
            stage.finish({}, "")
        with StageRun("evaluate", folder / "evaluate", {}) as stage:
            write_jsonl(folder / "evaluate" / "predictions.jsonl", predictions({"student": right}, 60))
            stage.finish({"problems": 60}, "60 problems")
        runs.append(folder)
    write_ablation_report(runs, tmp_path / "report", resamples=200)
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| setting | student | top\\_k | seeds |",
        "|---|---:|---:|---:|",
        "| k10 | 66.7 % | 10 | 1 |",
        "| k5 | 50.0 % | 5 | 1 |",
    ]
    rows = [row.split("</tr>")[0] for row in (tmp_path / "report" / "report.html").read_text().split("<tr>")[1:]]
    assert [row.count("<th") + row.count("<td") for row in rows] == [5, 5, 5]
