"""Random answers of every type: each writing equals every other of its value and none of another value; and reward hacks are never correct."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verification.generators import DRAW, HACKS, Item
from trl_reasoning_distill.verification.comparison import Rules, compare
from trl_reasoning_distill.verification.reading import read
from trl_reasoning_distill.verification.verify import verify_answers

SEEDS = st.integers(0, 2**32)
KINDS = sorted(DRAW)


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def pairs(kind: str, count: int, seed: int, *, equal: bool) -> list[tuple[str, str]]:
    """Gold answers and answers of a kind: two writings of one value, or one each of two values."""
    rng = random.Random(f"{kind} {seed}")
    found: list[tuple[str, str]] = []
    while len(found) < count:
        gold, other = DRAW[kind](rng), DRAW[kind](rng)
        if equal:
            found.append((rng.choice(gold.writings), rng.choice(gold.writings)))
        elif gold.key != other.key:
            found.append((rng.choice(gold.writings), rng.choice(other.writings)))
    return found


def wrongly_judged(kind: str, count: int, seed: int, *, equal: bool) -> list[tuple[str, str, object]]:
    drawn = pairs(kind, count, seed, equal=equal)
    verdicts = verify_answers([boxed(answer) for _, answer in drawn], [gold for gold, _ in drawn], num_workers=1)
    return [(*pair, v) for pair, v in zip(drawn, verdicts, strict=True) if (v.status == "correct") != equal]


COUNTS = [
    pytest.param(40, id="40"),
    pytest.param(100_000 // len(KINDS), id="1e5", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_writing_of_a_value_is_correct(kind: str, count: int) -> None:
    assert not wrongly_judged(kind, count, seed=1, equal=True)[:20]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_value_is_correct(kind: str, count: int) -> None:
    assert not wrongly_judged(kind, count, seed=2, equal=False)[:20]


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.sampled_from(KINDS))
def test_reading_is_reflexive_and_comparison_symmetric(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    one, other = DRAW[kind](rng), DRAW[kind](rng)
    left, right = rng.choice(one.writings), rng.choice(other.writings)
    assert read(left).answers, f"{left!r} was not read: {read(left).left_over!r}"
    for a in read(left).answers:
        assert compare(a, a, Rules())
        for b in read(right).answers:
            if type(a) is type(b):
                assert compare(a, b, Rules()) == compare(b, a, Rules())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_reading_and_comparing_never_raise(left: str, right: str) -> None:
    for a in read(left).answers:
        for b in read(right).answers:
            compare(a, b, Rules())


@settings(max_examples=150, deadline=None)
@given(
    SEEDS, st.sampled_from(KINDS), st.sampled_from(["foo^", "\\zzz", "@", "=", "5", "<", "and", "\\frac", "not", ")"])
)
def test_what_is_left_over_is_never_dropped(seed: int, kind: str, rest: str) -> None:
    item = DRAW[kind](random.Random(seed))
    gold = item.writings[0]
    verdict = verify_answers([boxed(f"{gold} {rest}")], [gold])[0]
    assert verdict.status != "correct", verdict


def hacks(per_kind: int) -> list[tuple[str, str]]:
    """Outputs that hold the gold answer without committing to it, and the gold answer; `选D` is a choice of D wherever it stands."""
    found = []
    for kind in KINDS:
        rng = random.Random(kind)
        for _ in range(per_kind):
            gold, wrong = _two(kind, rng)
            right, other = ([w for w in item.writings if not w.startswith(("选", "Option"))] for item in (gold, wrong))
            used = [hack for hack in HACKS if not (kind == "choice" and "B)" in hack)]
            found += [(hack.format(g=rng.choice(right), w=rng.choice(other)), right[0]) for hack in used]
    return found


def _two(kind: str, rng: random.Random) -> tuple[Item, Item]:
    while True:
        gold, wrong = DRAW[kind](rng), DRAW[kind](rng)
        if gold.key != wrong.key:
            return gold, wrong


def test_reward_hacks_are_never_correct() -> None:
    rows = hacks(per_kind=3)
    assert len({output for output, _ in rows}) >= 300
    verdicts = verify_answers([output for output, _ in rows], [gold for _, gold in rows], num_workers=1)
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if v.status == "correct"]
    assert not wrong, (len(wrong), wrong[:20])
