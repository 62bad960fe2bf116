"""Selection: only right, whole, well-formed traces; strategies; consensus; re-rendering; counts that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import VerifiedTrace
from trl_reasoning_distill.teacher.selection import (
    SelectionConfig,
    is_reasoning_ok,
    read_verified_traces,
    select_traces,
)
from trl_reasoning_distill.verification.extract import extract_answer


def trace(sample: int, reasoning: str = "2+2=4", final: str = "4", **changes: Any) -> VerifiedTrace:
    completion = f"<think>\n{reasoning}\n</think>\n\n{final}"
    values: dict[str, Any] = {
        "problem_id": "p", "sample": sample, "question": "2+2?", "gold_answer": "4", "completion": completion, "finish_reason": "stop",
        "num_tokens": len(reasoning), "model": "m", "seed": 0, "kind": "sum", "source": "s", "status": "correct", "reasoning_ok": True,
    }  # fmt: skip
    values |= changes
    return VerifiedTrace(**{"extracted_answer": extract_answer(values["completion"]).answer} | values)


def texts(traces: list[VerifiedTrace], **options: Any) -> list[str]:
    return [row.completion[0]["content"] for row in select_traces(traces, SelectionConfig(**options)).rows]


def test_a_row_is_what_the_trainer_reads() -> None:
    (row,) = select_traces([trace(0), trace(1, status="incorrect")], SelectionConfig()).rows
    assert row.to_row() == {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "<think>\n2+2=4\n</think>\n\n4"}],
        "problem_id": "p",
        "kind": "sum",
        "source": "s",
        "answer": "4",
        "pass_rate": 0.5,
    }


def test_cut_malformed_wrong_and_undecided_traces_are_counted_and_never_taken() -> None:
    traces = [
        trace(0, finish_reason="length"), trace(1, reasoning_ok=False), trace(2, status="incorrect"), trace(3, status="undecided"),
        trace(0, problem_id="q"),
    ]  # fmt: skip
    selection = select_traces(traces, SelectionConfig(strategy="all"))
    assert [row.problem_id for row in selection.rows] == ["q"]
    expected = {
        "problems": 2,
        "problems_kept": 1,
        "traces": 5,
        "correct": 3,
        "incorrect": 1,
        "undecided": 1,
        "cut": 1,
        "malformed": 1,
    }
    assert selection.counts == expected | {"too_easy": 0, "thinned_out": 0, "not_rendered": 0}
    assert selection.pass_rates == {"p": 0.5, "q": 1.0}


def test_strategies() -> None:
    traces = [trace(2, "c" * 30), trace(0, "a" * 10), trace(1, "b" * 5), trace(3, "b" * 5)]
    assert texts(traces)[0].count("a") == 10, "first goes by sample, not by place in the file"
    assert texts(traces, strategy="shortest") == [trace(1, "b" * 5).completion]
    assert texts(traces, strategy="median") == [trace(0, "a" * 10).completion]
    assert len(texts(traces, strategy="all")) == 3, "a text is taken once"
    assert len(texts(traces, per_problem=2)) == 2


def test_diverse_takes_the_least_alike() -> None:
    traces = [
        trace(0, "first add two and two"),
        trace(1, "first add two and two."),
        trace(2, "four is twice two; done now"),
    ]
    assert trace(2, "four is twice two; done now").completion in texts(traces, strategy="diverse", per_problem=2)


def test_agreed_takes_the_way_that_most_take() -> None:
    traces = [
        trace(0, "multiply the sides, then halve"),
        trace(1, "add two and two to get four"),
        trace(2, "add two and two: get four"),
        trace(3, "add two and two, to get four"),
    ]
    assert texts(traces)[0] == traces[0].completion
    assert texts(traces, strategy="agreed")[0] in {each.completion for each in traces[1:]}
    assert texts(traces, strategy="agreed", per_problem=4)[-1] == traces[0].completion
    assert texts(traces[:1], strategy="agreed") == [traces[0].completion]


@pytest.mark.parametrize("easy_share", [0.0, 0.25, 1.0])
def test_easy_problems_are_thinned_out_by_their_pass_rate(easy_share: float) -> None:
    """Of 2,000 problems that are always solved, and 2,000 that are solved half the time."""
    traces = []
    for number in range(2000):
        traces += [trace(sample, problem_id=f"easy{number}") for sample in range(2)]
        traces += [trace(0, problem_id=f"hard{number}"), trace(1, problem_id=f"hard{number}", status="incorrect")]
    selection = select_traces(traces, SelectionConfig(easy_share=easy_share))
    kept = [row.problem_id for row in selection.rows]
    easy = sum(name.startswith("easy") for name in kept) / 2000
    hard = sum(name.startswith("hard") for name in kept) / 2000
    assert easy == pytest.approx(easy_share, abs=0.04)
    assert hard == pytest.approx(1 - (1 - easy_share) / 2, abs=0.04)
    fewer = select_traces(traces, SelectionConfig(easy_share=easy_share / 2)).rows
    assert {row.problem_id for row in fewer} <= set(kept)
    assert selection.counts["thinned_out"] == sum(
        1 + name.startswith("easy") for name in selection.pass_rates if name not in set(kept)
    )


def test_consensus_needs_no_gold_answer() -> None:
    def vote(sample: int, final: str, **changes: Any) -> VerifiedTrace:
        return trace(sample, f"r{sample}", final, **({"gold_answer": None, "status": "undecided"} | changes))

    def select(votes: list[VerifiedTrace], **options: Any) -> list[str]:
        return texts(votes, strategy="consensus", **options)

    traces = [vote(0, "5"), vote(1, "4"), vote(2, "$4.0$")]
    assert select(traces)[0].endswith(("4", "$4.0$"))
    assert texts(traces) == [], "other strategies take nothing that was not verified"
    assert select(traces, min_agreement=0.9) == []
    assert select([vote(0, "5", finish_reason="length"), vote(1, "5", finish_reason="length"), vote(2, "4")])[
        0
    ].endswith("4")


def test_rerender_in_another_format() -> None:
    target = ReasoningFormat.preset("gsm8k", system_prompt=None)
    assert texts([trace(0, final="The answer is $\\boxed{4}$.")], target_format=target) == ["2+2=4\n#### 4"]
    selection = select_traces([trace(0)], SelectionConfig(target_format=ReasoningFormat.preset("boxed")))
    assert selection.rows[0].prompt[0]["role"] == "system"
    tagged = trace(0, completion="2<think>+2\n#### 4")
    options = SelectionConfig(
        source_format=ReasoningFormat.preset("gsm8k"), target_format=ReasoningFormat.preset("think")
    )
    assert select_traces([tagged], options).counts["not_rendered"] == 1


def test_easy_problems_can_be_left_out() -> None:
    traces = [trace(0), trace(1), trace(0, problem_id="q"), trace(1, problem_id="q", status="incorrect")]
    selection = select_traces(traces, SelectionConfig(max_pass_rate=0.9))
    assert [row.problem_id for row in selection.rows] == ["q"]
    assert selection.counts["too_easy"] == 2


def test_reasoning_ok_wants_a_format_and_a_reasoning() -> None:
    think = ReasoningFormat.preset("think")
    assert is_reasoning_ok("<think>\nr\n</think>\n\n4", think)
    assert not is_reasoning_ok("<think>\n\n</think>\n\n4", think)
    assert not is_reasoning_ok("r</think>4", think)
    assert not is_reasoning_ok("4", ReasoningFormat.preset("gsm8k"))


def test_traces_survive_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "verdicts.jsonl", [trace(0).to_row(), trace(1).to_row()])
    assert read_verified_traces(tmp_path / "verdicts.jsonl") == [trace(0), trace(1)]


def test_verdicts_of_version_0_1_0_are_read_and_the_answer_is_extracted_then(tmp_path: Path) -> None:
    row = {
        "problem_id": "p", "sample": 0, "question": "2+2?", "answer": "4", "completion": "<think>\n2+2=4\n</think>\n\n4",
        "finish_reason": "stop", "num_tokens": 5, "model": "m", "seed": 0, "kind": "sum", "source": "s", "status": "undecided",
        "method": "none", "reason": "no result within 2 s", "reasoning_ok": True, "rule": "whole",
    }  # fmt: skip
    write_jsonl(tmp_path / "verdicts.jsonl", [row])
    (found,) = read_verified_traces(tmp_path / "verdicts.jsonl")
    assert (found.gold_answer, found.extracted_answer, found.rule, found.timed_out) == ("4", "4", "whole", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "there are"),
        ({"per_problem": 0}, "at least 1"),
        ({"max_pass_rate": 0.0}, "max_pass_rate"),
        ({"easy_share": 1.5}, "easy_share"),
    ],
)
def test_errors_teach(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**options)
