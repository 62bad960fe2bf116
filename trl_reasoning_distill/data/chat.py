"""From messages to token ids, with what users wrote kept from posing as the template's own tokens.

A question that holds `<|im_end|>\\n<|im_start|>assistant` would end the user's turn and begin the assistant's; one that holds `<think>` would
become the real token where a vocabulary has it. `encode_chat` encodes such text as the plain characters it is. Only the assistant's
own messages keep their special tokens: think tags are meant there.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

_FIRST_STAND_IN, _LAST_STAND_IN = (
    0xE000,
    0xF8FF,
)  # Unicode's private use area: characters that no template and no merge knows
_ANCHOR = "\n"
_PATTERNS: weakref.WeakKeyDictionary[Any, tuple[int, re.Pattern[str] | None]] = weakref.WeakKeyDictionary()
"""Tokenizer to the size of its vocabulary and the pattern of its added tokens: Gemma has six thousand of them."""


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Mapping[str, list[int]]:
    """`tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)`, safe from what users wrote.

    The ids are the same for messages without the text of an added token, so for all but hostile or curious ones. In the others each
    such text is encoded as plain characters.

    Args:
        tokenizer: A `transformers` tokenizer; a fast one, if a message is to be made safe.
        messages: The conversation.
        options: For `apply_chat_template`.

    Raises:
        ValueError: If a message is to be made safe and the tokenizer cannot say which characters a token stands for.
    """
    guarded, originals = _guard(tokenizer, messages)
    if not originals:
        encoded: Mapping[str, list[int]] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, **options
        )
        return encoded
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"A message holds {next(iter(originals.values()))!r}, a token of this vocabulary. Encoding it as text needs a fast tokenizer; "
            f"{type(tokenizer).__name__} is none. Take the text out, or load the fast version."
        )
    text = tokenizer.apply_chat_template(guarded, tokenize=False, **_without_mask(options))
    encoded = tokenizer.apply_chat_template(
        guarded, tokenize=True, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True}, **options
    )
    return _replace_stand_ins(tokenizer, encoded, text, originals)


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """The text a conversation becomes, up to where the model begins to write; without a chat template its messages, one after the other."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages) + "\n"
    text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)
    return text


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> list[int]:
    """The ids of `render_prompt`, safe from what users wrote."""
    if not tokenizer.chat_template:
        return list(tokenizer(render_prompt(tokenizer, messages))["input_ids"])
    return encode_chat(tokenizer, messages, add_generation_prompt=True, **options)["input_ids"]


def holds_added_token(tokenizer: Any, text: str) -> bool:
    """Whether a text holds the writing of a token that was added to the vocabulary, such as `<|im_end|>`."""
    pattern = _added_tokens(tokenizer)
    return bool(pattern and pattern.search(text))


def _guard(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages with a stand-in for each added token that a user wrote, and what each stands for."""
    pattern = _added_tokens(tokenizer)
    stand_ins: dict[str, str] = {}
    taken = {character for message in messages for character in str(message.get("content"))}
    free = (chr(code) for code in range(_FIRST_STAND_IN, _LAST_STAND_IN) if chr(code) not in taken)

    def stand_in(match: re.Match[str]) -> str:
        if match[0] not in stand_ins:
            stand_ins[match[0]] = next(free)
        return stand_ins[match[0]]

    guarded = []
    for message in messages:
        content = message.get("content")
        if pattern and isinstance(content, str) and message.get("role") != "assistant":
            message = {**message, "content": pattern.sub(stand_in, content)}
        guarded.append(dict(message))
    return guarded, {character: text for text, character in stand_ins.items()}


def _replace_stand_ins(
    tokenizer: Any, encoded: Mapping[str, Any], text: str, originals: Mapping[str, str]
) -> dict[str, list[int]]:
    """Put the plain tokens of the originals where the stand-ins' tokens are; every per-token list stays in step."""
    offsets = encoded["offset_mapping"]
    columns = {name: list(values) for name, values in encoded.items() if name != "offset_mapping"}
    replaced: dict[str, list[int]] = {name: [] for name in columns}
    index = 0
    while index < len(offsets):
        start, end = offsets[index]
        if not any(character in originals for character in text[start:end]):
            for name, values in columns.items():
                replaced[name].append(values[index])
            index += 1
            continue
        first = index  # all tokens that share a character with this stand-in, or with the next that touches it
        while index < len(offsets) and offsets[index][0] < end:
            end = max(end, offsets[index][1])
            index += 1
        plain = "".join(originals.get(character, character) for character in text[start:end])
        ids = _encode_plainly(tokenizer, plain)
        for name, values in columns.items():
            replaced[name] += ids if name == "input_ids" else [values[first]] * len(ids)
    return replaced


def _encode_plainly(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in which no added token is seen: each is cut after its first character."""
    pattern = _added_tokens(tokenizer)
    cuts, position = [0], 0
    while pattern and (match := pattern.search(text, position)):
        cuts.append(match.start() + 1)
        position = match.start() + 1
    pieces = [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if start < end]
    return [token for piece in pieces for token in _encode_piece(tokenizer, piece)]


def _encode_piece(tokenizer: Any, piece: str) -> list[int]:
    """The ids of a piece as it stands within a text: without the space that some tokenizers put before a text."""
    encoded = tokenizer(_ANCHOR + piece, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if any(start < len(_ANCHOR) < end for start, end in offsets):  # the anchor and the piece have merged
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])
    return [token for token, (start, end) in zip(ids, offsets, strict=True) if end > len(_ANCHOR)]


def _added_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern for the text of each added token that is more than a character long; made anew when the vocabulary has grown."""
    size = len(tokenizer)
    known = _PATTERNS.get(tokenizer)
    if known is None or known[0] != size:
        texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        longest_first = sorted((text for text in texts if len(text) > 1 and not text.isspace()), key=len, reverse=True)
        known = size, re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        _PATTERNS[tokenizer] = known
    return known[1]


def _without_mask(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "return_assistant_tokens_mask"}
