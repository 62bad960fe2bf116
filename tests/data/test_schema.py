"""Records cross stages whole, and a row that is none is refused with the name of the column."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_reasoning_distill.data.schema import Prediction, Problem, Trace, TrainingRow, Verdict, VerifiedTrace

PROBLEM = Problem("p", "1+1?", "2", "s")
TRACE = Trace("p", 0, "1+1?", None, "2", "stop", 1, "m", 7)
VERDICT = Verdict("correct", "exact", "same", "2", "whole")
VERIFIED = VerifiedTrace(**TRACE.to_row(), **VERDICT.columns(), reasoning_ok=True)
PREDICTION = Prediction("base", "p", question="1+1?", gold_answer="2", completion="2", **VERDICT.columns())


@pytest.mark.parametrize("record", [PROBLEM, TRACE, VERDICT, VERIFIED, PREDICTION])
def test_a_row_of_json_gives_the_record_back(record: Any) -> None:
    row = json.loads(json.dumps(record.to_row()))
    assert type(record).from_row(row) == record
    assert list(row) == [field.name for field in dataclasses.fields(record)]
    assert type(record).from_row({**row, "column of somebody else": 1}) == record


@given(st.builds(Problem, st.text(), st.text(), st.none() | st.text(), st.text(), st.none() | st.text(), st.text()))
def test_any_text_survives(problem: Problem) -> None:
    assert Problem.from_row(problem.to_row()) == problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, "Problem wants str in column 'question', found int"),
        ({"answer": 2}, "wants str or null in column 'answer'"),
        ({"id": None}, "column 'id', found NoneType"),
    ],
)
def test_a_wrong_type_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^file, line 3: .*{message}"):
        Problem.from_row({**PROBLEM.to_row(), **change}, "file, line 3")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"Problem needs the column 'question', found only \['id'\]"):
        Problem.from_row({"id": "p"})


def test_a_whole_number_may_stand_for_a_float_but_a_truth_value_for_nothing() -> None:
    @dataclasses.dataclass(frozen=True)
    class Scored(Problem):
        score: float = 0.0

    assert Scored.from_row({**PROBLEM.to_row(), "score": 1}).score == 1.0
    with pytest.raises(ValueError, match="score"):
        Scored.from_row({**PROBLEM.to_row(), "score": True})


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROBLEM.id = "q"  # type: ignore[misc]


def test_a_training_row_names_only_what_it_has() -> None:
    row = TrainingRow(prompt=[{"role": "user", "content": "1+1?"}], completion=[{"role": "assistant", "content": "2"}])
    assert list(row.to_row()) == ["prompt", "completion", "answer"]
    with_tools = dataclasses.replace(row, tools=[{"type": "function"}], pass_rate=0.5)
    assert set(with_tools.to_row()) == {"prompt", "completion", "answer", "tools", "pass_rate"}
    for each in (row, with_tools):
        assert TrainingRow.from_row(json.loads(json.dumps(each.to_row()))) == each


def test_files_of_version_0_1_0_are_read() -> None:
    trace = {
        "problem_id": "p", "sample": 0, "question": "1+1?", "answer": "2", "completion": "2", "finish_reason": "stop", "num_tokens": 1,
        "model": "m", "seed": 7, "kind": "sum", "source": "s", "prompt_tokens": 9,
    }  # fmt: skip
    read = Trace.from_row(trace)
    assert (read.gold_answer, read.prompt_tokens) == ("2", 9)
    prediction = {
        "model": "base", "model_path": "m", "problem_id": "p", "sample": 0, "kind": "sum", "question": "1+1?", "gold": "2",
        "reference_steps": None, "prompt": [{"role": "user", "content": "1+1?"}], "output": "It is 3.", "answer": "3", "rule": "whole",
        "status": "undecided", "method": "none", "reason": "no result within 2 s", "finish_reason": "stop", "num_tokens": 3,
        "prompt_tokens": 9, "seconds": 0.1, "mean_log_prob": -0.5,
    }  # fmt: skip
    found = Prediction.from_row(prediction)
    assert (found.gold_answer, found.extracted_answer, found.completion, found.timed_out) == (
        "2",
        "3",
        "It is 3.",
        True,
    )
    with pytest.raises(ValueError, match="wants str or null in column 'gold', found int"):
        Prediction.from_row({**prediction, "gold": 2})
