"""No evaluation problem in the training data, and no training problem lost without need."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.decontamination import NGRAM, Decontaminator, read_evaluation_sets
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import SourceUnavailableError, load_problems

TEXT = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=40).map(" ".join)


def problem(question: str, name: str = "x") -> Problem:
    return Problem(name, question, "1", "s")


@given(TEXT, TEXT)
@settings(max_examples=200)
def test_a_question_is_contaminated_if_it_shares_n_words_in_a_row_or_is_the_same(
    training: str, evaluation: str
) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        tokens = text.split()
        return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}

    find = Decontaminator({"set": [problem(evaluation, "y")]}, ngram=5)
    expected = bool(runs(training) & runs(evaluation)) or training == evaluation
    assert (find(problem(training)) is not None) == expected


def test_what_was_found_is_said() -> None:
    question = "Bella bought stamps at the post office, and some of the stamps had a snowflake design."
    find = Decontaminator(
        {"gsm8k:test": [problem(question, "gsm8k-test-000632")], "other": [problem("What is 1+1?", "o")]}
    )
    assert find.sizes == {"gsm8k:test": 1, "other": 1}
    refusal = find(problem(f"Yesterday {question} How many?"))
    assert refusal is not None
    assert (refusal.cause, refusal.detail) == ("contaminated", "gsm8k:test")
    assert refusal.reason == (
        "'bella bought stamps at the post office and some of the stamps had' stands in gsm8k-test-000632 of gsm8k:test"
    )
    short = find(problem("what is 1 + 1"))
    assert short is not None
    assert short.reason == "it is the question of o in other"
    assert find(problem("What is 1+1, and what is 2+2?")) is None, "a short question inside a longer one is no evidence"
    assert Decontaminator({"set": [problem("√?")]})(problem("∑?")) is None


def test_gsm_hard_is_gsm8ks_test_set_and_the_training_set_is_not(shared_data: Path) -> None:
    sets = read_evaluation_sets(["gsm8k", "math500"], data_dir=str(shared_data))
    assert {name: len(problems) for name, problems in sets.items()} == {"gsm8k:test": 1319, "math500:test": 500}
    find = Decontaminator(sets)
    counts = {
        source: sum(find(each) is not None for each in load_problems(source, data_dir=str(shared_data)))
        for source in ("gsm8k", "gsm_hard", "svamp")
    }
    assert counts == {"gsm8k": 4, "gsm_hard": 1301, "svamp": 0}
    assert NGRAM == 13


def test_sets_that_cannot_be_had_or_are_trained_on_are_said(
    tmp_path: Path, shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = read_evaluation_sets(data_dir=str(shared_data), trained_on={"svamp:test"})
    assert set(found) == {"gsm8k:test", "gsm_hard:test", "math500:test"}
    assert "NOT DECONTAMINATED against gsm_plus:test, asdiv:test, math:test, aime:2024, aime:2025" in caplog.text
    assert "svamp:test IS TRAINED ON" in caplog.text
    own = tmp_path / "own.jsonl"
    write_jsonl(own, [{"question": "1+1?", "answer": "2"}])
    assert [len(problems) for problems in read_evaluation_sets([str(own)]).values()] == [1]
    with pytest.raises(SourceUnavailableError, match="no copy of asdiv"):
        read_evaluation_sets(["asdiv"], data_dir=str(shared_data))
    with pytest.raises(ValueError, match="trained on and named"):
        read_evaluation_sets(["svamp:test"], data_dir=str(shared_data), trained_on={"svamp:test"})
    with pytest.raises(ValueError, match="Unknown source 'gsm9'"):
        read_evaluation_sets(["gsm9"])
    with pytest.raises(ValueError, match="at least one word"):
        Decontaminator({}, ngram=0)
