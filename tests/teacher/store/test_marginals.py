"""Targets between tokenizers against brute force: all that a teacher could write, in float64, cut by the student's own tokenizer.

The teacher is a table of random next-token probabilities. It writes tokens as its own tokenizer cuts them: a pair of tokens that the
tokenizer would cut otherwise has no probability.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_reasoning_distill.data.tokenization import supervised_positions, tokenize_example
from trl_reasoning_distill.teacher.store import StoredRow
from trl_reasoning_distill.teacher.store.cuts import RARELY
from trl_reasoning_distill.teacher.store.matching import RowAligner
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary

ALPHABET = "01ab "
EOS = "</s>"


def make_toy(
    pieces: list[str] = (), merges: list[tuple[str, str]] = (), split: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the bytes, some pieces that are one token each, and some merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(byte_level.pre_tokenize_str(piece)[0][0]) for piece in pieces]
    joined = ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *spelled, *joined]))}
    backend = Tokenizer(models.BPE(vocab, list(merges), ignore_merges=bool(pieces)))
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def digits_up_to(count: int) -> PreTrainedTokenizerFast:
    """Numbers in groups of up to some digits, as Llama 3 reads them; anything else byte by byte."""
    groups = ["".join(p) for n in range(2, count + 1) for p in itertools.product("01", repeat=n)]
    return make_toy(groups, split=rf"[0-9]{{1,{count}}}|[^0-9]")


@functools.cache
def toy(name: str) -> PreTrainedTokenizerFast:
    if name == "bytes":
        return make_toy()
    if name.startswith("digits"):
        return digits_up_to(int(name[-1]))
    merges = {
        "merges": [("a", "b"), ("Ġ", "ab"), ("0", "1"), ("b", "b")],
        "words": [("Ġ", "a"), ("Ġa", "b"), ("b", "a"), ("Ġab", "a")],
    }
    return make_toy(merges=merges[name])


@functools.cache
def toy_aligner(names: tuple[str, str]) -> RowAligner:
    return RowAligner(*map(toy, names))


TOYS = ["bytes", "digits2", "digits3", "merges", "words"]


class Teacher:
    """Next-token probabilities that hang on the last token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, sharpness: float, temperature: float) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.eos = tokenizer.eos_token_id
        texts = {i: value.decode() for i, value in self.vocabulary.bytes_of.items() if value.isascii()}
        self.tokens = {i: text for i, text in texts.items() if set(text) <= set(ALPHABET)}
        self.seed, self.sharpness, self.temperature = seed, sharpness, temperature
        self.encode = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.after = functools.cache(self._after)

    def _after(self, last: int) -> dict[int, float]:
        before = self.vocabulary.bytes_of[last].decode()
        allowed = [i for i, text in self.tokens.items() if self.encode(before + text) == (last, i)]
        logits = np.random.default_rng([self.seed, last]).normal(size=len(allowed) + 1) * self.sharpness
        weights = np.exp((logits - logits.max()) / self.temperature)
        return dict(zip([*allowed, self.eos], weights / weights.sum(), strict=True))

    def dense(self, rows: list[int]) -> np.ndarray:
        """Log-probabilities after some tokens, `(rows, vocabulary)`."""
        log_probs = np.full((len(rows), self.vocabulary.size), -np.inf)
        for row, last in enumerate(rows):
            for token, p in self.after(last).items():
                log_probs[row, token] = np.log(p)
        return log_probs

    def continuations(self, last: int, begins: str, length: int) -> dict[str, float]:
        """What follows a token: texts of some length, or shorter ones that end with EOS, whose first token begins with `begins`."""
        done: dict[str, float] = defaultdict(float)
        going: dict[tuple[str, int], float] = {
            (self.tokens.get(i, EOS), i): p
            for i, p in self.after(last).items()
            if self.tokens.get(i, EOS).startswith(begins)
        }
        while going:
            longer: dict[tuple[str, int], float] = defaultdict(float)
            for (text, token), p in going.items():
                if token == self.eos:
                    done[text] += p
                elif len(text) >= length:
                    done[text[:length]] += p
                else:
                    for i, q in self.after(token).items():
                        longer[text + self.tokens.get(i, EOS), i] += p * q
            going = longer
        return done


def by_brute_force(
    teacher: Teacher, student: PreTrainedTokenizerFast, before: list[int], last: int, begins: str, reach: int
) -> dict[int, float]:
    """Probability of the student's next token, given its tokens `before` and that the teacher's token begins with `begins`."""
    text = "".join(student.decode([i]) for i in before)
    found: dict[int, float] = defaultdict(float)
    continuations = teacher.continuations(last, begins, len(begins) + reach)
    texts = [text + continuation[len(begins) :] for continuation in continuations]
    for p, encoded in zip(continuations.values(), student.backend_tokenizer.encode_batch(texts), strict=True):
        tokens = encoded.ids
        if tokens[: len(before)] == before:
            found[tokens[len(before)]] += p
    total = sum(found.values())
    return {token: p / total for token, p in found.items()} if total else {}


def read(teacher: Teacher, aligner: RowAligner, names: tuple[str, str], text: str, top_m: int | None):
    """The plan for a text, the teacher's distributions, and the token that it reads before each of them."""
    tokenizers = [toy(name) for name in names]
    example = {"prompt": "Q:\n", "completion": text}
    tokens = tokenize_example(tokenizers[0], example)
    at = supervised_positions(tokens.labels)
    lasts = [tokens.input_ids[t - 1] for t in at]
    log_probs = teacher.dense(lasts)
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, : top_m or log_probs.shape[1]]
    kept = np.take_along_axis(log_probs, ids, axis=1)
    ids = np.where(np.isneginf(kept), -1, ids) if top_m else ids
    plan = aligner.align(StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, len(at), ""), example)
    return plan, ids, kept, lasts


@settings(max_examples=60, deadline=None)
@given(
    names=st.sampled_from(list(itertools.permutations(TOYS, 2))),
    text=st.text(ALPHABET, min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.5, 2.0, 5.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_m=st.sampled_from([None, None, 3, 6]),
)
def test_targets_are_those_of_brute_force(names, text, seed, sharpness, temperature, top_m):
    check(names, text, seed, sharpness, temperature, top_m)


def check(names, text, seed, sharpness, temperature, top_m) -> None:
    teacher, student = Teacher(toy(names[0]), seed, sharpness, temperature), toy(names[1])
    aligner = toy_aligner(names)
    plan, ids, log_probs, lasts = read(teacher, aligner, names, text, top_m)
    targets = aligner.targets([plan], ids, log_probs, 40, temperature)
    at = supervised_positions(plan.labels)
    start = at[0]
    reach = 1 + max(len(value) for value in Vocabulary(student).bytes_of.values())
    for place, t in enumerate(at):
        record, skipped = int(plan.positions.records[place]), int(plan.positions.skipped[place])
        assert record >= 0
        begins = plan.text.values[record][:skipped].decode()
        expected = by_brute_force(teacher, student, list(plan.input_ids[start:t]), lasts[record], begins, reach)
        listed = targets.ids[place] >= 0
        target = dict(
            zip(targets.ids[place][listed].tolist(), np.exp(targets.log_probs[place][listed], dtype=float), strict=True)
        )
        compare(expected, target, None if top_m else 1e-3)


def compare(expected: dict[int, float], target: dict[int, float], most: float | None) -> None:
    """No token has more than it should, none is impossible; with all of the vocabulary the divergence is small."""
    for token, p in target.items():
        assert token in expected, "the student's tokenizer cannot cut this token here"
        assert p <= expected[token] * (1 + 1e-5) + 1e-7
    if most is not None and target:
        tail = max(0.0, 1.0 - sum(target.values()))
        should = 1.0 - sum(expected[token] for token in target)
        divergence = sum(expected[token] * np.log(expected[token] / p) for token, p in target.items())
        divergence += should * np.log(should / tail) if should > 1e-6 else 0.0
        assert divergence <= most


@pytest.mark.parametrize("share", [0.005, 0.3])
def test_what_seldom_becomes_longer_counts_by_its_mean(share):
    """A teacher that hardly ever puts a digit after a digit: once that is learnt, its digits are targets; if it often does, they are tail."""

    class Hesitant(Teacher):
        def _after(self, last: int) -> dict[int, float]:
            probs = super()._after(last)
            is_digit = {i: self.tokens.get(i, "") in ("0", "1") for i in probs}
            if self.tokens.get(last, "") not in ("0", "1"):
                return probs
            sums = [sum(p for i, p in probs.items() if is_digit[i] == kind) for kind in (False, True)]
            return {i: p / sums[is_digit[i]] * (share if is_digit[i] else 1 - share) for i, p in probs.items()}

    names = ("bytes", "digits2")
    teacher, student = Hesitant(toy("bytes"), 3, 1.0, 1.0), toy("digits2")
    aligner = RowAligner(toy("bytes"), student)
    plan, ids, log_probs, lasts = read(teacher, aligner, names, "0 1a0b1 ", None)
    start, place = supervised_positions(plan.labels)[0], 2  # at the first "1"
    before = list(plan.input_ids[start : start + place])
    expected = by_brute_force(teacher, student, before, lasts[place], "", reach=3)
    (other,) = student.encode("0")
    assert expected[other] > 0.01
    before_learning = aligner.targets([plan], ids, log_probs, 40)
    assert other not in before_learning.ids[place]
    aligner.learn([plan], ids, log_probs)
    targets = aligner.targets([plan], ids, log_probs, 40)
    found = np.exp(targets.log_probs[place][targets.ids[place] == other], dtype=float).tolist()
    assert found == (pytest.approx([expected[other]], rel=0.01) if share < RARELY else [])
