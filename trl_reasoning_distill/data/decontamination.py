"""No problem of an evaluation set in the training data.

A training question is contaminated if it shares 13 consecutive words with a question of an evaluation set, or is that question: the
rule of GPT-3's report (Brown et al. 2020, appendix C). Numbers count as words, so a question with other numbers is caught only where
13 words around them agree.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import BENCHMARKS, Refusal, SourceUnavailableError, read_source
from trl_reasoning_distill.data.words import ngram_hashes, question_hash, words

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
