"""Mixtures: counts and weights add up, kinds balance, fallbacks are loud, seeds fix everything."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.mixture import balance_by_kind, load_mixture, worked_rows
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import SourceUnavailableError, load_problems


def test_counts_of_real_sources_shuffled_by_the_seed(shared_data: Path) -> None:
    wanted = {"gsm8k": 30, "svamp": 10, "synthetic_arithmetic": 5}
    mixture = load_mixture(wanted, seed=1, data_dir=str(shared_data))
    assert Counter(problem.source for problem in mixture.problems) == wanted == mixture.counts
    assert len({problem.source for problem in mixture.problems[:12]}) > 1, "not one source after the other"
    assert load_mixture(wanted, seed=1, data_dir=str(shared_data)).problems == mixture.problems
    assert load_mixture(wanted, seed=2, data_dir=str(shared_data)).problems != mixture.problems


@pytest.mark.parametrize(("weights", "total"), [((3, 1), 10), ((1, 1), 7), ((0.2, 0.8), 13)])
def test_weights_share_the_total(weights: tuple[float, float], total: int, shared_data: Path) -> None:
    settings = {"gsm8k": {"weight": weights[0]}, "svamp": {"weight": weights[1]}}
    counts = load_mixture(settings, total=total, data_dir=str(shared_data)).counts
    assert sum(counts.values()) == total
    assert abs(counts["gsm8k"] - total * weights[0] / sum(weights)) < 1


def test_balance_by_kind(shared_data: Path) -> None:
    problems = load_problems("svamp", data_dir=str(shared_data))
    kinds = Counter(problem.kind for problem in balance_by_kind(problems, 100))
    assert kinds == dict.fromkeys(kinds, 25)
    few = [Problem(str(i), "q", "1", "s", kind="rare" if i < 2 else "common") for i in range(50)]
    assert Counter(problem.kind for problem in balance_by_kind(few, 10)) == {"rare": 2, "common": 8}
    assert len(balance_by_kind(few, 100)) == 50
    mixture = load_mixture({"svamp": {"count": 40, "balance_by_kind": True}}, data_dir=str(shared_data))
    assert set(Counter(problem.kind for problem in mixture.problems).values()) == {10}


def test_a_fallback_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"gsm8k": {"count": 4, "fallback": "synthetic_arithmetic"}}
    with caplog.at_level(logging.WARNING):
        mixture = load_mixture(settings, data_dir=str(tmp_path), decontaminate=False)
    assert {problem.source for problem in mixture.problems} == {"synthetic_arithmetic"}
    assert "CANNOT BE HAD" in caplog.text
    with pytest.raises(SourceUnavailableError):
        load_mixture({"gsm8k": 4}, data_dir=str(tmp_path), decontaminate=False)


def test_errors_teach(tmp_path: Path, shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mixture, message in (
        ({}, "empty"),
        ({"gsm8k": 0}, "positive"),
        ({"gsm8k": {"count": 1, "weight": 1}}, "either a count or a weight"),
        ({"gsm8k": {"number": 1}}, "unknown settings"),
        ({"gsm8k": {"weight": 1}}, "need a total"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mixture(mixture, decontaminate=False)
    with pytest.raises(ValueError, match="add up to 3"):
        load_mixture({"gsm8k": 3}, total=5)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "same", "question": f"{name}?", "answer": "1"}])
    with pytest.raises(ValueError, match="distinct ids"):
        load_mixture({str(tmp_path / "a.jsonl"): 1, str(tmp_path / "b.jsonl"): 1}, decontaminate=False)
    load_mixture({str(tmp_path / "a.jsonl"): 9}, decontaminate=False)
    assert "has 1 problems, not the 9" in caplog.text


def test_duplicates_and_evaluation_problems_make_room_for_others(
    tmp_path: Path, shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published mixture's GSM-hard is GSM8K's test set with other numbers."""
    problems = load_problems("gsm8k", data_dir=str(shared_data), limit=20, seed=1)
    copies = tmp_path / "copies.jsonl"
    leaked = load_problems("gsm8k", split="test", data_dir=str(shared_data), limit=2)
    rows = [{"question": p.question.upper(), "answer": p.answer} for p in [*problems, *leaked]]
    write_jsonl(copies, [*rows, {"question": "Is this question in no other set of all that there are?", "answer": "1"}])
    wanted = {"gsm8k": {"count": 20}, str(copies): 3, "gsm_hard": 100}
    with caplog.at_level(logging.WARNING):
        mixture = load_mixture(wanted, seed=1, data_dir=str(shared_data))
    assert mixture.counts == {"gsm8k": 20, str(copies): 1, "gsm_hard": 18}
    assert "gsm_hard has 18 problems, not the 100" in caplog.text
    assert "gsm_hard:test IS TRAINED ON" in caplog.text
    assert mixture.evaluation_sets == {"gsm8k:test": 1319, "svamp:test": 1000, "math500:test": 500}
    left_out = mixture.left_out()
    assert left_out["contaminated"] == left_out["contaminated by gsm8k:test"] >= 1301 + 2
    assert left_out["duplicate"] == 20
    assert load_mixture(wanted, seed=1, data_dir=str(shared_data)).problems == mixture.problems
    everything = load_mixture(wanted, seed=1, data_dir=str(shared_data), deduplicate=False, decontaminate=False)
    assert everything.counts == {"gsm8k": 20, str(copies): 3, "gsm_hard": 100}


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
