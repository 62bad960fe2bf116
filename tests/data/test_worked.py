"""Worked solutions become training rows in any format; those that a format cannot hold are named."""

from __future__ import annotations

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.worked import worked_rows

WORKED = Problem("a", "1+1?", "2", "s", solution="1+1=2", kind="sum")


def test_rows_are_what_the_trainings_read() -> None:
    rows, rejected = worked_rows([WORKED, Problem("b", "q", "2", "s")], ReasoningFormat.preset("think"))
    assert rejected == []
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "1+1?"}],
            "completion": [{"role": "assistant", "content": "<think>\n1+1=2\n</think>\n\n2"}],
            "answer": "2",
            "problem_id": "a",
            "kind": "sum",
            "source": "s",
        }
    ]


def test_the_sources_own_reply_follows_the_reasoning_where_the_format_marks_no_answer() -> None:
    problem = Problem("a", "1+1?", "2", "s", solution="1+1=2", response="It is \\boxed{2}.")
    for name, expected in (("think", "<think>\n1+1=2\n</think>\n\nIt is \\boxed{2}."), ("gsm8k", "1+1=2\n#### 2")):
        ((row,), _) = worked_rows([problem], ReasoningFormat.preset(name))
        assert row["completion"][0]["content"] == expected


def test_what_a_format_cannot_hold_is_set_aside_with_its_text() -> None:
    problem = Problem("a", "1+1?", "2", "s", solution="so </think> ends it")
    rows, (rejected,) = worked_rows([problem], ReasoningFormat.preset("think"))
    assert rows == []
    assert (rejected.where, rejected.cause) == ("a", "not_rendered")
    assert rejected.to_row()["row"]["solution"] == "so </think> ends it"
