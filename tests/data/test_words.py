"""Words, n-grams and numbers of a text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trl_reasoning_distill.data.words import ngram_hashes, numbers, question_hash, words


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
