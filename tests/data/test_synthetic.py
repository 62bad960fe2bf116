"""`synthetic_arithmetic`: exact answers, distinct problems, splits that share nothing, and a stream that never changes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.synthetic import FAMILIES, iter_problems, split_of

PINNED = [
    "synthetic_arithmetic-train-c025311c4524",
    "synthetic_arithmetic-train-e7e7e4ebe9d1",
    "synthetic_arithmetic-test-69983108723d",
]
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)\.")


def problems(split: str, count: int, **options: Any) -> list[Problem]:
    return list(islice(iter_problems(split, **options), count))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_is_right_and_the_last_one_is_the_answer(split: str) -> None:
    for problem in problems(split, 1500, steps=(1, 2, 3, 4)):
        lines = (problem.solution or "").splitlines()
        values = []
        for line in lines:
            left, op, right, value = STEP.search(line).groups()  # type: ignore[union-attr]
            exact = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
                "/": int(left) / int(right),
            }
            assert exact[op] == int(value)
            values.append(value)
        assert values[-1] == problem.answer
        assert problem.kind.endswith(f"-{len(lines)}")


def test_steps_use_only_what_is_given_or_computed_before() -> None:
    for problem in problems("train", 500):
        known = set(re.findall(r"\d+", problem.question)) | {"2", "3"}  # twice, triples, three times
        for line in (problem.solution or "").splitlines():
            left, _, right, value = STEP.search(line).groups()  # type: ignore[union-attr]
            assert {left, right} <= known
            known.add(value)


def test_train_and_test_share_no_question_and_no_numbers() -> None:
    train, test = problems("train", 5000), problems("test", 2000)
    assert len({problem.id for problem in train}) == 5000
    assert not {problem.question for problem in train} & {problem.question for problem in test}

    def numbers(problem: Problem) -> tuple[str, ...]:
        # In `groups` the question tells all numbers in the order in which the split sees them.
        return (
            problem.kind,
            problem.answer or "",
            *re.findall(r"\d+", problem.question),
            *sorted(re.findall(r"[-+*/]", problem.solution or "")),
        )

    groups = [{numbers(p) for p in split if p.kind.startswith("groups")} for split in (train, test)]
    assert groups[0]
    assert not groups[0] & groups[1]


def test_split_of_sees_family_and_numbers() -> None:
    shares = Counter(split_of("chain", [a, b]) for a in range(100) for b in range(100))
    assert 0.11 < shares["test"] / 10_000 < 0.14
    assert split_of("chain", [5, "+", 3]) == split_of("chain", [5, "+", 3])


def test_the_stream_is_pinned() -> None:
    """The shipped teacher was trained on this stream: another one would make its training data its test data."""
    first = problems("train", 2) + problems("test", 1)
    assert [problem.id for problem in first] == PINNED
    assert problems("train", 3, seed=1) != problems("train", 3)


def test_steps_and_families_can_be_chosen() -> None:
    kinds = {problem.kind for problem in problems("train", 300, steps=(2,), families=("chain", "shop"))}
    assert kinds == {"chain-2", "shop-2"}
    assert {problem.kind.partition("-")[0] for problem in problems("train", 300)} == set(FAMILIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"split": "dev"}, "splits"), ({"split": "train", "steps": (5,)}, "1 to 4 steps"), ({"split": "train", "steps": ()}, "1 to 4"), ({"split": "train", "families": ("x",)}, "Unknown families")],
)  # fmt: skip
def test_errors_teach(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter_problems(**options))
