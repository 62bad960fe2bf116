"""No problem of an evaluation set in the training data.

A training question is contaminated if it shares 13 consecutive words with a question of an evaluation set, or is that question: the
rule of GPT-3's report (Brown et al. 2020, appendix C). Numbers count as words, so a question with other numbers is caught only where
13 words around them agree.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import BENCHMARKS, Refusal, SourceUnavailableError, read_source

_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character is a word
_WORDS = re.compile(rf"\d+(?:[.,]\d+)*|[{_CJK}]|[^\W\d_{_CJK}]+")
_NUMBER_WORDS = frozenset(
    {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"}
    | {"thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty"}
    | {"fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion", "half", "third"}
    | {"quarter", "once", "twice", "thrice", "double", "triple", "dozen"}
)


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case, without punctuation, mark-up or width variants; `1,000` is `1000`."""
    found = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word.replace(",", "") if word[0].isdecimal() else word for word in found]


def question_hash(text: str, tokens: list[str]) -> int:
    """The 64-bit hash of a text's words; a text without any, such as `√?`, is hashed by its characters."""
    return xxhash.xxh3_64_intdigest((" ".join(tokens) or text).encode())


def ngram_hashes(tokens: list[str], n: int) -> list[int]:
    """The 64-bit hash of each run of n words, in order; none if there are fewer."""
    return [xxhash.xxh3_64_intdigest(" ".join(tokens[i : i + n]).encode()) for i in range(len(tokens) - n + 1)]


def numbers(tokens: list[str]) -> tuple[str, ...]:
    """The numbers among a text's words, in order, in figures or written out."""
    return tuple(word for word in tokens if word[0].isdecimal() or word in _NUMBER_WORDS)


logger = logging.getLogger(__name__)

NGRAM = 13


class Decontaminator:
    """Refuses problems that stand in an evaluation set.

    Args:
        evaluation_sets: Name to its problems.
        ngram: Consecutive words that must agree.

    Attributes:
        sizes: Name of each evaluation set to its number of problems.
    """

    def __init__(self, evaluation_sets: Mapping[str, Iterable[Problem]], ngram: int = NGRAM) -> None:
        if ngram < 1:
            raise ValueError(f"ngram={ngram}: at least one word must agree.")
        self.ngram = ngram
        self.sizes: dict[str, int] = {}
        self._whole: dict[int, tuple[str, str]] = {}
        self._ngrams: dict[int, tuple[str, str]] = {}
        for name, problems in evaluation_sets.items():
            self.sizes[name] = 0
            for problem in problems:
                self.sizes[name] += 1
                tokens = words(problem.question)
                self._whole.setdefault(question_hash(problem.question, tokens), (name, problem.id))
                for value in ngram_hashes(tokens, ngram):
                    self._ngrams.setdefault(value, (name, problem.id))

    def __call__(self, problem: Problem) -> Refusal | None:
        """`None` for a problem that stands in no evaluation set."""
        tokens = words(problem.question)
        if found := self._whole.get(question_hash(problem.question, tokens)):
            return Refusal("contaminated", f"it is the question of {found[1]} in {found[0]}", found[0])
        for position, value in enumerate(ngram_hashes(tokens, self.ngram)):
            if found := self._ngrams.get(value):
                shared = " ".join(tokens[position : position + self.ngram])
                return Refusal("contaminated", f"{shared!r} stands in {found[1]} of {found[0]}", found[0])
        return None


def read_evaluation_sets(
    names: Sequence[str] | None = None, *, data_dir: str | None = None, trained_on: Collection[str] = ()
) -> dict[str, list[Problem]]:
    """The evaluation sets that training data must not hold.

    Args:
        names: Sources, each a name (its evaluation splits), `name:split`, or a path to a file. `None` for every named evaluation set
            that can be had here: those that cannot are said.
        data_dir: Folder with local copies of named sources.
        trained_on: Sources that are trained on, as `name:split`; they are no evaluation sets then, which is said.

    Returns:
        `name:split` (or the path) to its problems.

    Raises:
        SourceUnavailableError: If one that was named cannot be had.
        ValueError: If one that was named is unknown, or is trained on.
    """
    found, missing, both = {}, [], []
    for source, split in BENCHMARKS if names is None else [part for name in names for part in _splits(name)]:
        name = f"{source}:{split}" if split else source
        if name in trained_on:
            both.append(name)
            continue
        try:
            options: dict[str, Any] = {"data_dir": data_dir} if data_dir and split else {}
            found[name] = read_source(source, split=split, **options).problems
        except SourceUnavailableError:
            if names is not None:
                raise
            missing.append(name)
    if both and names is not None:
        raise ValueError(
            f"{', '.join(both)} is trained on and named as an evaluation set; take it out of one of the two."
        )
    if both:
        logger.warning("%s IS TRAINED ON: do not report an accuracy on it.", ", ".join(both))
    if missing:
        logger.warning("NOT DECONTAMINATED against %s: cannot be had here.", ", ".join(missing))
    return found


def _splits(name: str) -> list[tuple[str, str | None]]:
    """A name to the sources and splits it stands for."""
    source, colon, split = name.partition(":")
    known = [(each, benchmark) for each, benchmark in BENCHMARKS if each == source]
    if known and not colon:
        return list(known)
    return [(source, split)] if known else [(name, None)]


_SHINGLE = 3
_PERMUTATIONS = 128
_MARGIN = 0.8  # look for candidates below the threshold: at the threshold itself, hashing misses every second one
_SCHEME = "affine32"  # datasketch permutes 32-bit values; a shingle's hash is good without another


@dataclass(frozen=True)
class _Entry:
    """What is kept of a problem that was admitted."""

    id: str
    answer: str | None
    numbers: tuple[str, ...]
    shingles: np.ndarray


class Deduplicator:
    """Remembers the problems it was asked about, and refuses those that it has seen.

    Args:
        threshold: Jaccard similarity of the questions' word 3-grams from which on they are near duplicates; `None` finds exact ones only.

    Raises:
        ValueError: If the threshold is not in (0, 1].
        MissingExtraError: If near duplicates are wanted and datasketch is not installed.
    """

    def __init__(self, threshold: float | None = 0.8) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"near_duplicate_threshold={threshold}: must be above 0 and at most 1.")
        self.threshold = threshold
        self._exact: dict[int, tuple[str, str | None]] = {}
        self._near: list[_Entry] = []
        self._index: Any = None
        if threshold is not None:
            import datasketch  # takes half a second, which exact comparison does not need

            self._sketch = datasketch
            self._index = self._sketch.MinHashLSH(threshold=_MARGIN * threshold, num_perm=_PERMUTATIONS)
            self._permutations = self._sketch.MinHash(num_perm=_PERMUTATIONS, scheme=_SCHEME).permutations

    def __call__(self, problem: Problem) -> Refusal | None:
        """`None` for a problem that is new; it then counts as seen."""
        tokens = words(problem.question)
        key = question_hash(problem.question, tokens)
        if key in self._exact:
            first, answer = self._exact[key]
            other = "" if answer == problem.answer else f", which gives the answer {answer!r}, not {problem.answer!r}"
            return Refusal("duplicate", f"the same question as {first}{other}")
        if self._index is not None and (refusal := self._find_near(problem, tokens)):
            return refusal
        self._exact[key] = (problem.id, problem.answer)
        return None

    def _find_near(self, problem: Problem, tokens: list[str]) -> Refusal | None:
        hashes = ngram_hashes(tokens, min(_SHINGLE, len(tokens)) or 1)
        entry = _Entry(problem.id, problem.answer, numbers(tokens), np.unique(np.array(hashes, dtype=np.uint64)))
        sketch = self._sketch.MinHash(hashfunc=int, permutations=self._permutations, scheme=_SCHEME)
        sketch.update_batch((entry.shingles & 0xFFFFFFFF).tolist())
        for candidate in sorted(self._index.query(sketch)):
            other = self._near[candidate]
            if other.numbers != entry.numbers or (other.answer and entry.answer and other.answer != entry.answer):
                continue
            similarity = _jaccard(entry.shingles, other.shingles)
            if similarity >= (self.threshold or 0):
                return Refusal("near_duplicate", f"{similarity:.0%} of its word 3-grams are those of {other.id}")
        self._index.insert(len(self._near), sketch, check_duplication=False)
        self._near.append(entry)
        return None


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)
