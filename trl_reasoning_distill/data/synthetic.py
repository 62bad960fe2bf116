"""`synthetic_arithmetic`: word problems made on the spot, so that the quickstart needs no download.

A problem is drawn in three layers: a *family* (what happens: a chain of events, two people, groups, a comparison, a
purchase, a division), the *numbers*, and the *surface* (names, things, phrasings). Its reference solution is drawn too:
the order of independent steps, the order of operands in a sum, and the wording of each step vary, so that a model trained
on these solutions has honest uncertainty about what comes next, and its logits say more than one sampled text does.

Train and test are disjoint by construction: a hash of the family and the numbers (not of the surface) assigns every
problem to one split, so a test problem never occurs in training under another name either. The numbers count in their order:
2 bags of 9 and 9 bags of 2 are two problems, and may lie in different splits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from trl_reasoning_distill.data.schema import Problem

SOURCE_NAME = "synthetic_arithmetic"
SPLITS = ("train", "test")
MAX_STEPS = 4
_TEST_SHARE = 8  # one in eight number combinations belongs to the test split
_MAX_VALUE = 200

_NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida")
_THINGS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs")
_HOLDERS = (("bag", "bags"), ("box", "boxes"), ("shelf", "shelves"), ("basket", "baskets"))
_STEP_PHRASES = ("{}.", "So {}.", "That makes {}.", "Now {}.")
_GAIN = ("{n} gets {x} more.", "{n} finds {x} more.", "Then {n} buys {x} {t}.")
_LOSE = ("{n} gives away {x}.", "{n} loses {x} of them.", "Then {n} sells {x} {t}.")
_TIMES = {
    2: ("Then {n} doubles the number.", "Then {n} has twice as many."),
    3: ("Then {n} triples the number.", "Then {n} has three times as many."),
}


class _TooLargeError(Exception):
    """The numbers drawn left the range this source promises; draw again."""


@dataclass(frozen=True)
class _Step:
    """One calculation, `left op right = value`; `needs` are the indices of the steps that must come before it."""

    left: int
    op: str
    right: int
    needs: tuple[int, ...] = ()

    @property
    def value(self) -> int:
        if self.op == "/":
            return self.left // self.right
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.op]


@dataclass
class _Draft:
    """A problem under construction: sentences, steps, and the numbers that identify it."""

    rng: random.Random
    sentences: list[str] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    numbers: list[int | str] = field(default_factory=list)

    def number(self, low: int, high: int) -> int:
        value = self.rng.randint(low, high)
        self.numbers.append(value)
        return value

    def choose(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def compute(self, left: int, op: str, right: int, *needs: int) -> tuple[int, int]:
        """Append a step and return its value and its index."""
        step = _Step(left, op, right, tuple(needs))
        if not 0 < step.value < _MAX_VALUE:
            raise _TooLargeError
        self.steps.append(step)
        return step.value, len(self.steps) - 1


def _events(
    draft: _Draft, name: str, thing: str, value: int, count: int, needs: tuple[int, ...] = ()
) -> tuple[int, tuple[int, ...]]:
    """Let `count` things happen to what `name` has; return what is left and the step that it rests on."""
    for _ in range(count):
        op = draft.choose("++--*")
        draft.numbers.append(op)
        if op == "*":
            factor = draft.number(2, 3)
            draft.say(draft.choose(_TIMES[factor]).format(n=name))
            value, index = draft.compute(value, "*", factor, *needs)
        else:
            amount = draft.number(2, 40 if op == "+" else max(2, min(40, value - 1)))
            draft.say(draft.choose(_GAIN if op == "+" else _LOSE).format(n=name, x=amount, t=thing))
            value, index = draft.compute(value, op, amount, *needs)
        needs = (index,)
    return value, needs


def _chain(draft: _Draft, steps: int) -> None:
    """One person, `steps` events in a row."""
    name, thing = draft.choose(_NAMES), draft.choose(_THINGS)
    start = draft.number(5, 60)
    draft.say(f"{name} has {start} {thing}.")
    _events(draft, name, thing, start, steps)
    draft.say(f"How many {thing} does {name} have now?")


def _total(draft: _Draft, steps: int) -> None:
    """Two people, `steps - 1` events between them, and their sum: what happens to each is independent of the other."""
    first, second = draft.rng.sample(_NAMES, 2)
    thing = draft.choose(_THINGS)
    split = draft.rng.randint(0, steps - 1)
    totals = []
    for name, count in ((first, split), (second, steps - 1 - split)):
        start = draft.number(4, 50)
        draft.say(f"{name} has {start} {thing}.")
        totals.append(_events(draft, name, thing, start, count))
    (left, left_needs), (right, right_needs) = totals
    draft.compute(left, "+", right, *left_needs, *right_needs)
    draft.say(
        draft.choose(
            (f"How many {thing} do they have together?", f"How many {thing} do {first} and {second} have in all?")
        )
    )


def _groups(draft: _Draft, steps: int) -> None:
    """Groups of equal size: a product (1 step), a product and a few more (2), two products (3), and some taken away (4)."""
    name, thing = draft.choose(_NAMES), draft.choose(_THINGS)
    holders = draft.rng.sample(_HOLDERS, 2)
    products = []
    for _, plural in holders[: 2 if steps >= 3 else 1]:
        count, each = draft.number(2, 9), draft.number(2, 12)
        draft.say(f"{name} has {count} {plural} with {each} {thing} each.")
        products.append(draft.compute(count, "*", each))
    value, index = products[0]
    if len(products) == 2:
        value, index = draft.compute(value, "+", products[1][0], index, products[1][1])
    if steps in (2, 4):
        _events(draft, name, thing, value, 1, (index,))
    draft.say(f"How many {thing} does {name} have now?")


def _compare(draft: _Draft, steps: int) -> None:
    """Each person's share is told relative to the one before; for three steps and more the sum is asked for."""
    names = draft.rng.sample(_NAMES, 3)
    thing = draft.choose(_THINGS)
    value = draft.number(8, 40)
    draft.say(f"{names[0]} has {value} {thing}.")
    values: list[tuple[int, tuple[int, ...]]] = [(value, ())]
    people = {1: 2, 2: 2 + draft.rng.randint(0, 1), 3: 3, 4: 3}[steps]
    for who, other in zip(names[1:people], names, strict=False):
        relation = draft.choose(("more", "fewer", "times"))
        draft.numbers.append(relation)
        before, needs = values[-1]
        if relation == "times":
            factor = draft.number(2, 3)
            draft.say(f"{who} has {'twice' if factor == 2 else 'three times'} as many {thing} as {other}.")
            value, index = draft.compute(before, "*", factor, *needs)
        else:
            amount = draft.number(2, 30 if relation == "more" else max(2, min(30, before - 1)))
            draft.say(f"{who} has {amount} {relation} {thing} than {other}.")
            value, index = draft.compute(before, "+" if relation == "more" else "-", amount, *needs)
        values.append((value, (index,)))
    asked_for_sum = steps > len(values) - 1
    if not asked_for_sum:
        draft.say(f"How many {thing} does {names[people - 1]} have?")
        return
    everyone = steps == 2 or steps == 4
    terms = values if everyone else values[1:]
    total, needs = terms[0]
    for term, term_needs in terms[1:]:
        total, index = draft.compute(total, "+", term, *needs, *term_needs)
        needs = (index,)
    if everyone:
        draft.say(f"How many {thing} do they have together?")
    else:
        draft.say(f"How many {thing} do {names[1]} and {names[2]} have in all?")


def _shop(draft: _Draft, steps: int) -> None:
    """A purchase: prices times counts, their sum, and what is left of the money."""
    name = draft.choose(_NAMES)
    things = draft.rng.sample(_THINGS, 2)
    products = []
    for thing in things[: 2 if steps >= 3 else 1]:
        count, price = draft.number(2, 9), draft.number(2, 12)
        draft.say(
            draft.choose(
                (
                    f"{name} buys {count} {thing} for {price} dollars each.",
                    f"{name} pays {price} dollars each for {count} {thing}.",
                )
            )
        )
        products.append(draft.compute(count, "*", price))
    cost, index = products[0]
    if len(products) == 2:
        cost, index = draft.compute(cost, "+", products[1][0], index, products[1][1])
    if steps in (1, 3):
        draft.say(f"How many dollars does {name} pay?")
        return
    money = cost + draft.rng.randint(2, 40)
    draft.numbers.append(money)
    draft.sentences.insert(0, f"{name} has {money} dollars.")
    draft.compute(money, "-", cost, index)
    draft.say(f"How many dollars does {name} have now?")


def _share(draft: _Draft, steps: int) -> None:
    """Equal shares: what there is, after `steps - 1` events, divided by a few friends."""
    name, thing = draft.choose(_NAMES), draft.choose(_THINGS)
    start = draft.number(6, 60)
    draft.say(f"{name} has {start} {thing}.")
    value, needs = _events(draft, name, thing, start, steps - 1)
    divisors = [d for d in range(2, 7) if value % d == 0 and value // d > 1]
    if not divisors:
        raise _TooLargeError
    friends = draft.rng.choice(divisors)
    draft.numbers.append(friends)
    draft.compute(value, "/", friends, *needs)
    draft.say(f"{name} shares them equally among {friends} friends. How many {thing} does each friend get?")


_FAMILIES: dict[str, Callable[[_Draft, int], None]] = {
    "chain": _chain,
    "total": _total,
    "groups": _groups,
    "compare": _compare,
    "shop": _shop,
    "share": _share,
}
FAMILIES = tuple(_FAMILIES)


def _solution(draft: _Draft) -> str:
    """Write the steps in a random order that respects what each needs, with random operand order and wording."""
    rng = draft.rng
    done: set[int] = set()
    lines = []
    while len(done) < len(draft.steps):
        ready = [i for i, step in enumerate(draft.steps) if i not in done and done.issuperset(step.needs)]
        index = rng.choice(ready)
        step = draft.steps[index]
        left, right = step.left, step.right
        if step.op in "+*" and rng.random() < 0.5:
            left, right = right, left
        lines.append(rng.choice(_STEP_PHRASES).format(f"{left}{step.op}{right}={step.value}"))
        done.add(index)
    return "\n".join(lines)


def split_of(family: str, numbers: Sequence[int | str]) -> str:
    """The split that a problem's family and numbers belong to, whatever its names and wording."""
    key = family + ":" + ",".join(map(str, numbers))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def draw_problem(rng: random.Random, split: str, steps: Sequence[int], families: Sequence[str] = FAMILIES) -> Problem:
    """Draw one problem of `split` with a number of steps from `steps`; the same `rng` state gives the same problem."""
    while True:
        family, count = rng.choice(families), rng.choice(steps)
        draft = _Draft(rng)
        try:
            _FAMILIES[family](draft, count)
        except _TooLargeError:
            continue
        if split_of(family, draft.numbers) != split:
            continue
        question = " ".join(draft.sentences)
        return Problem(
            id=f"{SOURCE_NAME}-{split}-{hashlib.blake2b(question.encode(), digest_size=6).hexdigest()}",
            question=question,
            answer=str(draft.steps[-1].value),
            solution=_solution(draft),
            source=SOURCE_NAME,
            kind=f"{family}-{count}",
        )


def iter_problems(
    split: str, *, seed: int = 0, steps: Sequence[int] = (2, 3, 4), families: Sequence[str] = FAMILIES
) -> Iterator[Problem]:
    """Endless distinct problems of one split, in a fixed order for a fixed seed.

    Args:
        split: `"train"` or `"test"`; the two share no combination of family and numbers.
        seed: Order and content of the stream.
        steps: The numbers of calculations a problem may need, each 1 to 4.
        families: Which families to draw from, among `FAMILIES`.

    Raises:
        ValueError: For an unknown split, family, or number of steps.
    """
    if split not in SPLITS:
        raise ValueError(f"synthetic_arithmetic has the splits {list(SPLITS)}, not {split!r}.")
    if not steps or any(not 1 <= count <= MAX_STEPS for count in steps):
        raise ValueError(f"synthetic_arithmetic makes problems of 1 to {MAX_STEPS} steps, not {list(steps)}.")
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"Unknown families {unknown} of synthetic_arithmetic; choose among {list(FAMILIES)}.")
    rng = random.Random(f"{SOURCE_NAME}/{split}/{seed}")
    seen: set[str] = set()
    while True:
        problem = draw_problem(rng, split, steps, families)
        if problem.id not in seen:
            seen.add(problem.id)
            yield problem
