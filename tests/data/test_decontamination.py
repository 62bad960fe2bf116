"""No evaluation problem in the training data, and no training problem lost without need."""

from __future__ import annotations

import dataclasses
import logging
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_reasoning_distill.data.decontamination import (
    NGRAM,
    Decontaminator,
    Deduplicator,
    ngram_hashes,
    numbers,
    question_hash,
    read_evaluation_sets,
    words,
)
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


def test_words_ignore_what_does_not_change_the_question() -> None:
    assert words("Janet’s DUCKS lay 1,600 eggs – 2.5 per day!") == [
        "janet", "s", "ducks", "lay", "1600", "eggs", "2.5", "per", "day",
    ]  # fmt: skip
    assert words("\\frac{1}{2}x") == ["frac", "1", "2", "x"]
    assert words("１２ ﬁsh") == ["12", "fish"]
    assert words("∑ ≥ √") == []
    assert words("小明有3个苹果") == ["小", "明", "有", "3", "个", "苹", "果"]
    assert question_hash("√?", []) != question_hash("∑?", [])
    assert question_hash("One, two.", ["one", "two"]) == question_hash("one two", ["one", "two"])


def test_numbers_in_figures_and_written_out() -> None:
    assert numbers(words("She eats three of 16, and sells half.")) == ("three", "16", "half")


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_there_is_a_hash_for_each_run_of_n_words(tokens: list[str], n: int) -> None:
    hashes = ngram_hashes(tokens, n)
    runs = [tuple(tokens[i : i + n]) for i in range(max(0, len(tokens) - n + 1))]
    assert len(hashes) == len(runs)
    assert len(set(hashes)) == len(set(runs))


QUESTION = (
    "Amanda received $50 as a gift. She plans to buy two cassette tapes that cost $9 each and a headphone set "
    "that costs $25. How much money will she have left?"
)
FIRST = Problem("first", QUESTION, "7", "s")


def second(question: str, answer: str | None = "7") -> Problem:
    return Problem("second", question, answer, "s")


def test_the_same_words_are_the_same_question() -> None:
    find = Deduplicator(None)
    assert find(FIRST) is None
    refusal = find(second(QUESTION.upper().replace(".", " …")))
    assert refusal is not None
    assert (refusal.cause, refusal.reason) == ("duplicate", "the same question as first")
    other = find(second(QUESTION, "8"))
    assert other is not None
    assert "which gives the answer '7', not '8'" in other.reason
    assert find(second(QUESTION.replace("gift", "present"))) is None, "near duplicates were not asked for"
    assert find(second("√?")) is None
    assert find(second("∑?")) is None


@pytest.mark.parametrize(
    ("question", "answer", "near"),
    [
        (QUESTION.replace("Amanda", "Bella"), "7", True),
        (QUESTION.replace("gift", "present"), None, True),
        (QUESTION.replace("$9", "$8"), "7", False),  # other numbers
        (QUESTION.replace("two", "three"), "7", False),  # also in words
        (QUESTION.replace("left", "spent"), "43", False),  # another answer
        ("A train travels 270 miles in 3 hours.", "7", False),
    ],
)
def test_near_duplicates_have_the_same_numbers_and_answer(question: str, answer: str | None, near: bool) -> None:
    find = Deduplicator(0.8)
    assert find(FIRST) is None
    refusal = find(second(question, answer))
    assert bool(refusal) == near
    if refusal:
        assert refusal.cause == "near_duplicate"
        assert "of its word 3-grams are those of first" in refusal.reason


def test_gsm8k_keeps_its_problems_and_loses_copies_of_them(shared_data: Path) -> None:
    problems = load_problems("gsm8k", data_dir=str(shared_data), limit=800)
    find = Deduplicator(0.8)
    assert sum(find(each) is not None for each in problems) <= 1
    copies = [dataclasses.replace(each, id=f"{each.id}-copy", question=f"  {each.question} ") for each in problems]
    assert all(find(each) is not None for each in copies)
    rng = random.Random(0)
    reworded = []
    for each in problems:
        words = each.question.split()
        if len(words) >= 40:  # one word of forty is three 3-grams of about 38 on either side
            words[rng.randrange(len(words))] += "y"
            reworded.append(dataclasses.replace(each, question=" ".join(words)))
    found = sum(find(each) is not None for each in reworded)
    assert found / len(reworded) > 0.9, "a few are other problems now, because the word was a number"


def test_short_questions_are_compared_by_what_words_they_have() -> None:
    find = Deduplicator(0.8)
    assert find(second("Why?")) is None
    assert find(second("What is 2+2?")) is None
    assert find(second("What is 2+3?")) is None


def test_errors_teach() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Deduplicator(0.0)
    assert Deduplicator(None)(FIRST) is None
