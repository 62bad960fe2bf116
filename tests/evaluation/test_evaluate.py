"""Evaluation: every answer judged once, everything counted, nothing hidden."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Prediction, Problem, Verdict
from trl_reasoning_distill.evaluation.compare import compare_models
from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig, evaluate_models, result_line
from trl_reasoning_distill.evaluation.metrics import summarize
from trl_reasoning_distill.teacher.sampling import (
    EngineArguments,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    loop,
)

PROBLEMS = [
    Problem(id=f"p{i}", question=f"What is {i} + 1?", answer=str(i + 1), source="s", kind="odd" if i % 2 else "even")
    for i in range(6)
]


class Calculator:
    """Adds one, with the mistakes it is told to make."""

    def __init__(self, wrong: Sequence[int] = (), cut: Sequence[int] = (), dies_after: int | None = None) -> None:
        self.name = "calculator"
        self.wrong, self.cut, self.dies_after = wrong, cut, dies_after
        self.asked: list[str] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        for request in reversed(requests):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request.key)
            number = int(request.key[1:].partition("#")[0])
            if number in self.cut:
                yield request, GenerationOutput("<think>\nlet me see", "length", 8, 4, 0.5)
            else:
                answer = number + 1 + 10 * (number in self.wrong)
                yield (
                    request,
                    GenerationOutput(f"<think>\n{number}+1={answer}\n</think>\n\n{answer}", "stop", 4, 4, 0.5),
                )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calculator]:
    """Models by path; each row is written down as it comes, so that a kill can come between any two."""
    known: dict[str, Calculator] = {}
    monkeypatch.setattr(
        EngineArguments, "make_engine", lambda self, model, kind=None: known[f"{kind}:{model}" if kind else model]
    )
    monkeypatch.setattr(loop, "in_chunks", lambda items: ([item] for item in items))
    return known


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_predictions_and_metrics_hold_what_was_asked_said_and_judged(
    tmp_path: Path, engines: dict[str, Calculator]
) -> None:
    engines |= {"good": Calculator(), "openai:bad": Calculator(wrong=[1, 3], cut=[4])}
    config = EvaluationConfig(response_format=ReasoningFormat.preset("think"))
    metrics = evaluate_models({"a": "good", "b": "openai:bad"}, PROBLEMS, tmp_path, config=config)
    found = rows(tmp_path)
    assert [(row["model"], row["problem_id"]) for row in found] == [(m, p.id) for m in "ab" for p in PROBLEMS]
    assert found[7] == {
        "model": "b",
        "model_path": "openai:bad",
        "problem_id": "p1",
        "sample": 0,
        "kind": "odd",
        "question": "What is 1 + 1?",
        "gold_answer": "2",
        "reference_steps": None,
        "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
        "completion": "<think>\n1+1=12\n</think>\n\n12",
        "extracted_answer": "12",
        "rule": found[7]["rule"],
        "status": "incorrect",
        "method": "numeric",
        "reason": found[7]["reason"],
        "timed_out": False,
        "finish_reason": "stop",
        "num_tokens": 4,
        "prompt_tokens": 4,
        "seconds": 0.5,
        "mean_log_prob": None,
    }
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    good, bad = metrics["models"]["a"], metrics["models"]["b"]
    assert (good["accuracy"], good["n"], good["undecided"], good["truncation_rate"], good["no_answer_rate"]) == (
        1.0,
        6,
        0,
        0.0,
        0.0,
    )
    assert (bad["correct"], bad["incorrect"], bad["truncation_rate"], bad["no_answer_rate"]) == (3, 3, 1 / 6, 1 / 6)
    interval = stats.binomtest(3, 6).proportion_ci(method="wilson")
    assert bad["ci95"] == pytest.approx([interval.low, interval.high])
    assert {kind: (part["n"], part["accuracy"]) for kind, part in bad["by_kind"].items()} == {
        "even": (3, 2 / 3),
        "odd": (3, 1 / 3),
    }
    assert (bad["mean_tokens"], bad["tokens_per_second"]) == (28 / 6, 28 / 3)
    assert (good["reasoning"]["think_tag_rate"], bad["reasoning"]["well_formed_rate"]) == (1.0, 5 / 6)
    assert result_line(metrics) == "a 100.0 % · b 50.0 % (n = 6)"
    assert compare_models(found).paired["b_vs_a"].difference == -0.5


def test_an_undecided_answer_is_neither_right_nor_wrong_and_is_said() -> None:
    verdicts = [
        Verdict("correct", "exact", "", "1", "whole"),
        Verdict("undecided", "none", "time-out", "1", "whole", timed_out=True),
        Verdict("incorrect", "exact", "", "1", "whole"),
    ]
    metrics = summarize(
        [
            Prediction("a", f"p{i}", completion="1", gold_answer="1", num_tokens=1, seconds=1.0, **verdict.columns())
            for i, verdict in enumerate(verdicts)
        ]
    )
    assert (metrics["correct"], metrics["incorrect"], metrics["undecided"]) == (1, 1, 1)
    assert (metrics["accuracy"], metrics["accuracy_decided"], metrics["undecided_rate"]) == (1 / 3, 1 / 2, 1 / 3)
    assert metrics["methods"] == {"exact": 1}
    assert result_line({"models": {"a": metrics}, "dataset": {"n": 3}}) == "a 33.3 % (n = 3, 1 answers undecided)"


def test_an_answer_that_a_server_does_not_give_is_undecided_with_its_reason(
    tmp_path: Path, engines: dict[str, Calculator]
) -> None:
    class Refuses(Calculator):
        def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> Any:
            for request, output in super().generate(requests, sampling):
                refused = GenerationOutput("", "error", 0, 0, 0.0, error="HTTP 400: filtered")
                yield request, refused if request.key == "p2#0" else output

    engines |= {"a": Refuses(), "b": Calculator()}
    metrics = evaluate_models({"a": "a", "b": "b"}, PROBLEMS, tmp_path, show_progress=False)
    assert (metrics["models"]["a"]["correct"], metrics["models"]["a"]["undecided"]) == (5, 1)
    assert metrics["models"]["a"]["truncation_rate"] == 0
    (refused,) = [row for row in rows(tmp_path) if row["finish_reason"] == "error"]
    assert (refused["problem_id"], refused["status"], refused["reason"]) == ("p2", "undecided", "HTTP 400: filtered")
    assert compare_models(rows(tmp_path)).models["a"].undecided == 1


def test_an_answer_is_judged_before_a_question_of_the_models_own(
    tmp_path: Path, engines: dict[str, Calculator]
) -> None:
    class RunsOn(Calculator):
        def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> Any:
            for request, output in super().generate(requests, sampling):
                yield request, dataclasses.replace(output, text=f"{output.text}\n\nQuestion: What is 6 + 6?\n\n12")

    engines |= {"base": RunsOn()}
    metrics = evaluate_models({"base": "base"}, PROBLEMS, tmp_path, show_progress=False)
    assert metrics["models"]["base"]["accuracy"] == 1.0
    assert not any("Question" in row["completion"] for row in rows(tmp_path))


def test_a_killed_evaluation_goes_on_per_answer_and_with_other_ranks(
    tmp_path: Path, engines: dict[str, Calculator], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"a": "first", "b": "second"}
    engines |= {"first": Calculator(), "second": Calculator(wrong=[2])}
    evaluate_models(models, PROBLEMS, tmp_path / "whole", show_progress=False)

    engines |= {"first": Calculator(), "second": Calculator(wrong=[2], dies_after=2)}
    with pytest.raises(KeyboardInterrupt):
        evaluate_models(models, PROBLEMS, tmp_path / "killed", show_progress=False)
    with open(tmp_path / "killed" / "predictions.rank0.jsonl", "a") as handle:
        handle.write('{"model": "torn')
    assert not (tmp_path / "killed" / "metrics.json").exists()

    engines |= {"first": Calculator(), "second": Calculator(wrong=[2])}
    evaluate_models(models, PROBLEMS, tmp_path / "killed", show_progress=False)
    assert engines["first"].asked == []
    assert len(engines["second"].asked) == 4

    engines |= {"first": Calculator(), "second": Calculator(wrong=[2])}
    for rank in (1, 0):
        state = types.SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(loop, "launch_state", lambda state=state: state)
        metrics = evaluate_models(models, PROBLEMS, tmp_path / "ranks", show_progress=False)
        assert bool(metrics) == (rank == 0)
    assert len(engines["first"].asked) == 6
    for name in ("predictions.jsonl", "metrics.json"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == expected
        assert (tmp_path / "ranks" / name).read_bytes() == expected


def test_answers_of_another_model_under_the_same_name_are_refused(
    tmp_path: Path, engines: dict[str, Calculator]
) -> None:
    engines |= {"first": Calculator(), "second": Calculator()}
    evaluate_models({"a": "first"}, PROBLEMS, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="answers of 'first' under the name 'a', which now means 'second'"):
        evaluate_models({"a": "second"}, PROBLEMS, tmp_path, show_progress=False)


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    no_answer = Problem(id="x", question="Why?", answer=None, source="s")
    for models, problems, message in [
        ({}, PROBLEMS, "no model"),
        ({"a": "m"}, [], "no problems"),
        ({"a": "m"}, [*PROBLEMS, no_answer], "1 problems have no answer .* 'x'"),
        ({"a": "m"}, PROBLEMS[:1] * 2, "belongs to 2 problems"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_models(models, problems, tmp_path)


def test_a_real_model_is_evaluated_end_to_end(tmp_path: Path, quickstart_models: Path) -> None:
    teacher = quickstart_models / "teacher"
    if not (teacher / "model.safetensors").is_file():
        pytest.skip(f"no teacher at {teacher}; make it with `python recipes/quickstart/pretrain.py`")
    from trl_reasoning_distill.data.sources import load_problems

    problems = load_problems("synthetic_arithmetic", split="test", limit=32, steps=[2])
    config = EvaluationConfig(SamplingConfig(128), ReasoningFormat.preset("think"))
    metrics = evaluate_models({"teacher": str(teacher)}, problems, tmp_path, config=config)["models"]["teacher"]
    assert metrics["accuracy"] >= 0.6
    assert metrics["reasoning"]["well_formed_rate"] >= 0.9
    assert metrics["undecided"] == 0
