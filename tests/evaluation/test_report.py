"""The report: true sentences, one file that asks nothing of the network, and model text that stays text."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from trl_reasoning_distill.data.files import write_json, write_jsonl
from trl_reasoning_distill.data.manifest import StageRun
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation import findings
from trl_reasoning_distill.evaluation.compare import Comparison, compare_models
from trl_reasoning_distill.evaluation.metrics import summarize
from trl_reasoning_distill.evaluation.report import write_report as write_full_report
from trl_reasoning_distill.evaluation.runs import trace_provenance

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}{% raw %}</pre></details>"
    "<svg onload=alert(1)><a href='https://evil.example/x'>x</a>\x00\x1b\u202e\ud800 12+7=18"
)


def write_report(*args: Any, **options: Any) -> Comparison:
    """A report with fewer resamples than a reader should get."""
    return write_full_report(*args, **{"resamples": 500} | options)


def prediction(model: str, problem: int, status: str, **columns: Any) -> dict[str, Any]:
    """A row of `predictions.jsonl`."""
    given: dict[str, Any] = {
        "model": model,
        "model_path": model,
        "problem_id": f"p{problem}",
        "kind": f"kind-{problem % 2}",
        "question": f"What is {problem} + 1?",
        "gold_answer": str(problem + 1),
        "completion": f"<think>\n{problem} + 1 = {problem + 1}\n</think>\n\n{problem + 1}",
        "extracted_answer": str(problem + 1),
        "rule": "whole",
        "status": status,
        "method": "numeric",
        "reason": "equal",
        "num_tokens": 20,
        "seconds": 0.5,
    }
    return Prediction(**given | columns).to_row()


def predictions(right: dict[str, int], n: int = 60) -> list[dict[str, Any]]:
    """Each model is right on its first `right` problems."""
    return [
        prediction(model, problem, "correct" if problem < count else "incorrect")
        for model, count in right.items()
        for problem in range(n)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folders of a small run: two trainings, a store, an evaluation."""
    for name in ("sft", "distill"):
        with StageRun(name, tmp_path / name, {"learning_rate": 1e-4}, seed=3) as stage:
            logged = [
                {"step": step, "sft_loss": 2 / step, "loss": math.nan if step == 1 else 1.0} for step in (1, 2, 3)
            ]
            if name == "distill":
                logged = [
                    entry | {"kd_loss": 0.5 / entry["step"], "kd_weight": 0.1 * entry["step"]} for entry in logged
                ]
            (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
            stage.finish({"steps": 3}, f"{name}: 3 steps")
    with StageRun("capture", tmp_path / "capture", {"top_k": 25}) as stage:
        (tmp_path / "capture" / "store").mkdir()
        write_json(
            tmp_path / "capture" / "store" / "manifest.json",
            {
                "positions": 1234,
                "rows": 40,
                "top_k": 25,
                "temperatures": [1.0, 2.0],
                "fingerprint": {"teacher": "big-one"},
            },
        )
        stage.finish({"mass_kept": 0.987}, "1,234 positions")
    models = {"models.sft": tmp_path / "sft" / "final_model", "models.distilled": tmp_path / "distill" / "final_model"}
    with StageRun("evaluate", tmp_path / "evaluate", {"max_new_tokens": 64}, models) as stage:
        rows = predictions({"base": 6, "sft": 24, "distilled": 45, "teacher": 57})
        write_jsonl(tmp_path / "evaluate" / "predictions.jsonl", rows)
        models = {
            name: [Prediction.from_row(row) for row in rows if row["model"] == name] for name in ("sft", "distilled")
        }
        write_json(
            tmp_path / "evaluate" / "metrics.json", {"models": {name: summarize(own) for name, own in models.items()}}
        )
        stage.finish({"problems": 60}, "60 problems")
    return tmp_path


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, as a browser's tokenizer sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def assert_self_contained(text: str) -> None:
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed", "form", "base", "audio", "video"} & {
        tag for tag, _ in page.tags
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag}> has a handler {name}"
            if name in ("href", "src", "xlink:href"):
                assert (tag, value) == ("link", "data:,") or (tag == "use" and str(value).startswith("#"))
            assert not re.search(r"(?:https?:)?//|url\((?!#)|javascript:", value or ""), f"<{tag} {name}={value!r}>"
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script" not in policies[0]
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert not any("url(" in style or "@import" in style for style in styles)


def test_a_whole_report(run):
    write_report(
        run / "evaluate",
        run / "report",
        training={"sft": run / "sft", "distilled": run / "distill"},
        store=run / "capture" / "store",
    )
    text = (run / "report" / "report.html").read_text()
    assert_self_contained(text)
    told = " ".join(" ".join(Page(text).texts).split())
    for expected in (
        "Distilled is better than SFT by 35.0 points",
        "75.0 % against 40.0 %",
        "recovers 76.5 %",
        "Of the gap that SFT leaves to teacher, distilled recovers 63.6 %",
        "SFT loss, nats per token",
        "KD weight α",
        "Kinds of errors",
        "How they write",
        "kind-1",
        "1,234",
        "big-one",
        "mass_kept",
        "Fixed: distilled is right, sft is not",
        "learning_rate",
        " + 1?",
    ):
        assert expected in told.replace("\N{NO-BREAK SPACE}", " "), expected
    assert "KL to the reference" not in told  # it was not logged
    assert {"evaluate", "sft", "distill", "capture"} <= {tag_text.strip() for tag_text in Page(text).texts}

    comparison = json.loads((run / "report" / "comparison.json").read_text())
    assert comparison["models"]["distilled"]["accuracy"] == 0.75
    assert comparison["paired"]["distilled_vs_sft"]["difference"] == pytest.approx(0.35)
    assert comparison["gap_recovered"] == pytest.approx(39 / 51)
    markdown = (run / "report" / "report.md").read_text()
    assert "| distilled against sft | +35.0 |" in markdown
    assert "What it cost" in told
    card = (run / "report" / "model_card.md").read_text()
    assert "Distilled is better than SFT by 35.0 points" in card
    assert "| distilled | 75.0 %" in card
    assert "1234 positions, Top-25" in card


def test_several_runs_of_each_model_are_one_model_on_the_page(tmp_path):
    rows = [
        prediction(
            f"{model}@{seed}" if seed is not None else model,
            problem,
            "correct" if problem < count + 2 * (seed or 0) else "incorrect",
        )
        for model, count, seeds in (("base", 6, [None]), ("sft", 20, range(3)), ("distilled", 40, range(3)))
        for seed in seeds
        for problem in range(60)
    ]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    comparison = write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert_self_contained(text)
    told = " ".join(" ".join(Page(text).texts).split()).replace("\N{NO-BREAK SPACE}", " ")
    assert comparison.models["distilled"].runs == 3
    assert "Distilled is better than SFT by 33.3 points" in told
    assert "by run +33.3, +33.3, +33.3" in told
    assert "crossed bootstrap over runs and problems" in told
    assert "sft@" not in told


def test_several_answers_per_problem_are_shown(tmp_path):
    rows = [
        prediction(
            model, problem, "correct" if (problem + sample) % 3 < count else "incorrect", sample=sample, model_path="m"
        )
        for model, count in (("sft", 1), ("distilled", 2))
        for problem in range(12)
        for sample in range(4)
    ]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    metrics = {
        model: summarize([Prediction.from_row(row) for row in rows if row["model"] == model])
        for model in ("sft", "distilled")
    }
    write_json(tmp_path / "metrics.json", {"models": metrics})
    write_report(tmp_path, tmp_path / "report")
    told = " ".join(Page((tmp_path / "report" / "report.html").read_text()).texts)
    for expected in ("pass@4", "maj@2", "paired permutation test"):
        assert expected in told, expected


def test_the_same_input_gives_the_same_files(run):
    for name in ("one", "two"):
        write_report(run / "evaluate", run / name, training={"sft": run / "sft"})
    for name in ("report.html", "report.md", "comparison.json"):
        assert (run / "one" / name).read_bytes() == (run / "two" / name).read_bytes()


def test_hostile_text_stays_text(tmp_path):
    rows = [
        prediction(
            model,
            problem,
            status,
            completion=HOSTILE,
            question=HOSTILE,
            gold_answer=HOSTILE,
            extracted_answer=HOSTILE,
            reason=HOSTILE,
            kind=HOSTILE + str(problem),
        )
        for model, status in ((f"a{HOSTILE}", "correct"), ("b|`x`", "incorrect"))
        for problem in range(4)
    ]
    (tmp_path / "evaluate").mkdir()
    with open(tmp_path / "evaluate" / "predictions.jsonl", "w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    write_report(tmp_path / "evaluate", tmp_path / "report", title=HOSTILE)
    text = (tmp_path / "report" / "report.html").read_text()
    assert_self_contained(text)
    assert "{{7*7}}" in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "\x00" not in text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert not re.search(r"(?<!\\)<(?:script|img|svg)", markdown)


def test_very_long_text_is_cut_and_says_so(tmp_path):
    write_jsonl(tmp_path / "predictions.jsonl", [prediction("sft", 0, "correct", completion="a" * 20_000)])
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert "12,000 more characters" in text
    assert "a" * 8_001 not in text


@pytest.mark.parametrize(
    "right", [{"only": 5}, {"x": 5, "y": 5, "z": 60}, {"sft": 0, "distilled": 60}, {"teacher": 3, "distilled": 3}]
)
def test_any_models_make_a_report(tmp_path, right):
    write_jsonl(tmp_path / "predictions.jsonl", predictions(right))
    write_report(tmp_path, tmp_path / "report", examples=0)
    assert_self_contained((tmp_path / "report" / "report.html").read_text())


def finding_of(right: dict[str, int], n: int = 60) -> findings.Finding:
    return findings.find(compare_models(predictions(right, n), resamples=500))


def test_findings_say_how_sure_they_are():
    assert finding_of({"sft": 20, "distilled": 40}).outcome == "better"
    worse = finding_of({"sft": 40, "distilled": 20})
    assert (worse.outcome, worse.title) == ("worse", "Distilled is worse than SFT by 33.3 points")
    unclear = finding_of({"sft": 20, "distilled": 22})
    assert (unclear.outcome, unclear.title) == ("unclear", "No difference was found between distilled and SFT")
    told = " ".join(unclear.sentences)
    assert "in 50 of 100 comparisons" in told  # 2 fixed, 0 broken: p = 0.5
    assert re.search(r"about [\d,]+ problems to find it", told)


def test_findings_tell_when_there_is_no_gap_and_when_verdicts_are_missing():
    assert "no gap to recover" in " ".join(finding_of({"base": 20, "teacher": 20, "distilled": 22}).sentences)
    rows = [*predictions({"sft": 20}), *predictions({"distilled": 20})]
    rows[-1]["status"] = "undecided"
    assert "count as not right: 1 of distilled" in " ".join(
        findings.find(compare_models(rows, resamples=500)).sentences
    )


def test_result_line():
    comparison = compare_models(predictions({"sft": 30, "distilled": 45}), resamples=500)
    line = findings.result_line(comparison, "runs/x/report/report.html")
    assert re.fullmatch(
        r"distilled 75\.0 % vs SFT 50\.0 % \(\+25\.0 points \[\d+\.\d, \d+\.\d\], p < 0\.001\); report at runs/x/report/report\.html",
        line,
    )


def test_provenance_follows_the_inputs(run):
    assert [stage.stage for stage in trace_provenance([run / "evaluate"])] == ["sft", "distill", "evaluate"]
    assert trace_provenance([run / "nowhere" / "at" / "all"]) == []


def test_refuses_what_is_not_there(run):
    with pytest.raises(FileNotFoundError, match=r"No predictions\.jsonl"):
        write_report(run / "sft", run / "report")
    with pytest.raises(FileNotFoundError, match=r"No trainer_state\.json"):
        write_report(run / "evaluate", run / "report", training={"sft": run / "evaluate"})
    with pytest.raises(ValueError, match="not a Top-K store"):
        write_report(run / "evaluate", run / "report", store=run / "evaluate")
    assert not (run / "report").exists()


def test_curves_of_a_training_that_has_not_ended(run):
    (run / "sft" / "checkpoint-9").mkdir()
    (run / "sft" / "checkpoint-10").mkdir()
    (run / "sft" / "trainer_state.json").unlink()
    write_json(run / "sft" / "checkpoint-9" / "trainer_state.json", {"log_history": [{"step": 9, "sft_loss": 7.5}]})
    write_json(run / "sft" / "checkpoint-10" / "trainer_state.json", {"log_history": [{"step": 10, "sft_loss": 0.125}]})
    write_report(run / "evaluate", run / "report", training={"sft": run / "sft"})
    assert "0.125 at step 10" in (run / "report" / "report.html").read_text()
