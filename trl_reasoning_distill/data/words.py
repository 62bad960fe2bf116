"""Texts as words and as hashes of word n-grams: what duplicates and contamination are found by."""

from __future__ import annotations

import re
import unicodedata

import xxhash

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
    """The 64-bit hash of a text's words; a text without any, such as `√?`, is told apart by its characters."""
    return xxhash.xxh3_64_intdigest((" ".join(tokens) or text).encode())


def ngram_hashes(tokens: list[str], n: int) -> list[int]:
    """The 64-bit hash of each run of n words, in order; none if there are fewer."""
    return [xxhash.xxh3_64_intdigest(" ".join(tokens[i : i + n]).encode()) for i in range(len(tokens) - n + 1)]


def numbers(tokens: list[str]) -> tuple[str, ...]:
    """The numbers among a text's words, in order, in figures or written out."""
    return tuple(word for word in tokens if word[0].isdecimal() or word in _NUMBER_WORDS)
