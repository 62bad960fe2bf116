"""Which token of one vocabulary is which of another: by the bytes it stands for, and special tokens by their role.

Names lie: two "Qwen2.5" embeddings have 152,064 and 151,936 rows for one tokenizer of 151,665 tokens. So nothing here looks at
names or sizes, only at what each id means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("eos_token", "bos_token", "pad_token", "unk_token")


class Vocabulary:
    """What the ids of a tokenizer stand for.

    Args:
        tokenizer: A `transformers` tokenizer with a `tokenizers` backend: byte-level BPE, or SentencePiece's conventions.

    Raises:
        ValueError: If it is of neither kind.

    Attributes:
        bytes_of: Id to bytes, for all tokens but special ones.
        special: Id to text, for special tokens.
        added: Id to text, for all tokens that were added to the vocabulary, special or not.
        fallback: Ids such as `<0x0A>` that stand for a single byte beside the regular token of that byte.
        role_of: Id to role, for the tokens that end, begin or pad a text or stand for what is unknown.
        size: One more than the highest id.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.added: dict[int, str] = {i: str(token) for i, token in added.items()}
        self.special: dict[int, str] = {i: str(token) for i, token in added.items() if token.special}
        self.fallback: set[int] = set()
        self._spec = _specification(tokenizer)
        is_byte_level = _is_byte_level(tokenizer, self._spec)
        space = " " if is_byte_level else "▁"  # Gemma's runs of spaces are added tokens
        self.bytes_of: dict[int, bytes] = {
            i: str(token).replace(space, " ").encode() for i, token in added.items() if not token.special
        }
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                continue
            if is_byte_level:
                self.bytes_of[i] = _byte_level_bytes(token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                self.bytes_of[i] = bytes.fromhex(match[1])
                self.fallback.add(i)
            else:
                self.bytes_of[i] = token.replace("▁", " ").encode()
        self.role_of: dict[int, str] = {}
        for role in reversed(_ROLES):  # a token that ends the text and pads it is known as the former
            i = getattr(tokenizer, f"{role}_id", None)
            if i is not None:
                self.role_of[i] = role
        self.size = 1 + max([*self.bytes_of, *self.special], default=-1)

    def cuts_as(self, other: Vocabulary) -> bool:
        """Whether both cut every text alike: one model, one normalisation, one way to split, whatever tokens were added."""
        return all(self._spec.get(part) == other._spec.get(part) for part in ("model", "normalizer", "pre_tokenizer"))

    def tokenize(self, values: Sequence[bytes]) -> list[list[int]]:
        """The tokens of pieces from inside a text: nothing is put before or behind them, and no special token is read in them.

        Args:
            values: UTF-8; what is not, such as half a character, has no tokens.
        """
        texts = [_as_text(value) for value in values]
        encoded = self._inner.encode_batch([text or "" for text in texts], add_special_tokens=False)
        return [one.ids for one in encoded]

    @cached_property
    def _inner(self) -> Any:
        from tokenizers import Tokenizer

        spec = {**self._spec, "truncation": None, "padding": None, "post_processor": None}
        for part in ("normalizer", "pre_tokenizer"):
            spec[part] = _without_prefix(spec.get(part))
        inner = Tokenizer.from_str(json.dumps(spec))
        inner.encode_special_tokens = True
        return inner


def map_vocabulary(teacher: Vocabulary, student: Vocabulary, student_size: int | None = None) -> npt.NDArray[np.int32]:
    """Teacher id to student id, −1 where there is no twin; no two teacher ids share one.

    Regular tokens are twins if they stand for the same bytes. Added tokens are if they have the same text, whether it counts as special
    (`[THINK]` of Magistral) or not (`<think>` of Qwen3), and special tokens without such a twin if they have the same role, such as to
    end the text.

    Args:
        teacher: The teacher's vocabulary.
        student: The student's.
        student_size: Rows of the student's embedding, if some of its tokenizer's ids have none.

    Returns:
        `(teacher.size,)` int32.
    """
    limit = student.size if student_size is None else student_size
    by_bytes: dict[bytes, int] = {}
    for i in sorted(student.bytes_of, key=lambda i: (i in student.fallback, i), reverse=True):
        if i < limit:
            by_bytes[student.bytes_of[i]] = i  # the regular token and the lowest id come last, and stay
    by_text = {text: i for i, text in student.added.items() if i < limit}
    by_role = {role: i for i, role in student.role_of.items() if i < limit}
    mapped = np.full(teacher.size, -1, np.int32)
    taken: set[int] = set()

    def pair(i: int, twin: int | None) -> None:
        if twin is not None and twin not in taken and mapped[i] < 0:
            mapped[i] = twin
            taken.add(twin)

    for i, value in teacher.bytes_of.items():  # the same id for the same bytes, whatever else has these bytes
        if i < limit and student.bytes_of.get(i) == value:
            pair(i, i)
    for i in sorted(teacher.bytes_of, key=lambda i: (i in teacher.fallback, i)):
        pair(i, by_bytes.get(teacher.bytes_of[i]))
    for i, text in teacher.added.items():
        pair(i, by_text.get(text))
    for i, role in teacher.role_of.items():
        if i in teacher.special:
            pair(i, by_role.get(role))
    return mapped


def _specification(tokenizer: Any) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a tokenizer without a fast version; only those with one can be aligned."
        )
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec


def _is_byte_level(tokenizer: Any, spec: dict[str, Any]) -> bool:
    """Whether tokens are written in GPT-2's alphabet for bytes; if not, in SentencePiece's conventions."""
    if '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")]):
        return True
    if spec["model"]["type"] in ("BPE", "Unigram") and "▁" in json.dumps(
        [spec.get("decoder"), spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False
    ):
        return False
    raise ValueError(
        f"{getattr(tokenizer, 'name_or_path', tokenizer)} is a {spec['model']['type']} tokenizer whose tokens cannot be told as bytes; "
        f"byte-level BPE and SentencePiece's conventions can."
    )


def _without_prefix(part: Any) -> Any:
    """A normaliser or pre-tokenizer that puts no space before a text."""
    if not isinstance(part, dict):
        return part
    members = next((name for name in ("normalizers", "pretokenizers") if name in part), None)
    if members:
        return {**part, members: [_without_prefix(one) for one in part[members] if one["type"] != "Prepend"]}
    if part["type"] == "Prepend":
        return None
    plain = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: plain.get(name, value) for name, value in part.items()}


def _as_text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_of_character()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # a token that was added to the vocabulary as plain text
        return token.encode()
