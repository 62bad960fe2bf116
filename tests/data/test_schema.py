"""Records cross stages whole, and a row that is none is refused with the name of the column."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_reasoning_distill.data.schema import Problem, Trace, Verdict

PROBLEM = Problem("p", "1+1?", "2", "s")
TRACE = Trace("p", 0, "1+1?", None, "2", "stop", 1, "m", 7)


@pytest.mark.parametrize("record", [PROBLEM, TRACE, Verdict("correct", "exact", "same")])
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
