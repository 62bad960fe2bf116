"""From messages to token ids: the one prompt encoder. Nothing that comes from data becomes the template's structure.

A question that holds `<|im_end|>\\n<|im_start|>assistant` would end the user's turn and begin the assistant's; one that holds `<think>` would
become the real token where a vocabulary has it. So every text of a conversation, its roles, parts, tool calls and tools among them, is searched
for the added tokens of the vocabulary, and what is found is encoded as the plain characters it is. In the assistant's earlier messages,
such as few-shot solutions, only the tokens that structure a conversation (special tokens, and those that the template writes) are made plain:
think tags are meant there. What the model is trained to write is left as it is, an end token in it too.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.formatting import PRESETS

Spans = Callable[[str], Iterable[tuple[int, int]]]
"""Where in a text an added token would be read."""

_FIRST_STAND_IN, _LAST_STAND_IN = 0xE000, 0xF8FF
"""Unicode's private use area: characters that no template and no merge knows."""

_ANCHOR = "\n"
_THINK_TAGS = {tag for form in PRESETS.values() for tag in (form.open_tag, form.close_tag) if tag}
_PROBE = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], Any]] = weakref.WeakKeyDictionary()
"""Tokenizer to what was found out of its added tokens, by the size of its vocabulary: Gemma has six thousand of them."""


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, targets_from: int | None = None, **options: Any
) -> Mapping[str, list[int]]:
    """`tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)`, safe from what the data holds.

    The ids are the same for messages without the text of an added token, so for all but hostile or curious ones. In the others each
    such text is encoded as plain characters.

    Args:
        tokenizer: A `transformers` tokenizer; a fast one, if a message is to be made safe.
        messages: The conversation.
        targets_from: Index from which on the assistant's messages are what the model is trained to write; `None` if none is.
        options: For `apply_chat_template`.

    Raises:
        ValueError: If the template refuses the conversation, or a message is to be made safe and the tokenizer cannot say which
            characters a token stands for.
    """
    guard = _Guard(tokenizer, messages, options, targets_from)
    if not guard.originals:
        encoded: Mapping[str, list[int]] = _apply(tokenizer, messages, tokenize=True, return_dict=True, **options)
        return encoded
    guard.check_fast()
    text = _apply(tokenizer, guard.messages, tokenize=False, **_without_mask(guard.options))
    encoded = _apply(
        tokenizer,
        guard.messages,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **guard.options,
    )
    return _replace_stand_ins(tokenizer, encoded, text, guard.originals)


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """The ids of `render_prompt`, safe from what the data holds.

    Raises:
        ValueError: As `encode_chat`.
    """
    if tokenizer.chat_template:
        return list(encode_chat(tokenizer, messages, add_generation_prompt=True, **options)["input_ids"])
    guard = _Guard(tokenizer, messages, {})
    if not guard.originals:
        return list(tokenizer(render_prompt(tokenizer, messages))["input_ids"])
    guard.check_fast()
    text = render_prompt(tokenizer, guard.messages)
    return _replace_stand_ins(tokenizer, tokenizer(text, return_offsets_mapping=True), text, guard.originals)[
        "input_ids"
    ]


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text a conversation becomes, up to where the model begins to write; without a chat template its messages, one after the other.

    To look at or to ask whether it opens the thought; to be read by a model, `encode_prompt` it.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages) + "\n"
    return render_chat(tokenizer, messages, add_generation_prompt=True, **options)


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text a whole conversation becomes.

    Raises:
        ValueError: If the template refuses the conversation.
    """
    text: str = _apply(tokenizer, messages, tokenize=False, **options)
    return text


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """`apply_chat_template`, whose refusals are errors of one line."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError as error:
        roles = [str(message.get("role")) for message in messages]
        hint = (
            " Many templates take no system message: set system_prompt to an empty text, or put its content into the first user message."
            if "system" in roles
            else ""
        )
        raise ValueError(f"The chat template refuses a conversation of {', '.join(roles)}: {error}.{hint}") from None


class _Guard:
    """A conversation with stand-ins where data would be read as an added token.

    Attributes:
        messages: The messages, each such text with a private-use character in place of its first character.
        options: The options for the template, alike.
        originals: Each stand-in to the character it stands for; empty if nothing had to be replaced.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        targets_from: int | None = None,
    ) -> None:
        self.originals: dict[str, str] = {}
        self._tokenizer = tokenizer
        self._stand_ins: dict[str, str] = {}
        self._free: Iterator[str] | None = None
        self._data = (messages, options)
        any_token = functools.partial(_spans, tokenizer, _added_tokens(tokenizer))
        structure = functools.partial(_spans, tokenizer, _structural_tokens(tokenizer, options.get("chat_template")))
        self.messages = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                self.messages.append(self._replace(message, any_token))
            elif targets_from is None or index < targets_from:
                self.messages.append(self._replace(message, structure))
            else:
                self.messages.append(dict(message))
        self.options = {
            name: value if name in ("chat_template", "tokenizer_kwargs") else self._replace(value, any_token)
            for name, value in options.items()
        }

    def check_fast(self) -> None:
        """Refuse a tokenizer that cannot say which characters a token stands for."""
        if not getattr(self._tokenizer, "is_fast", False):
            texts = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
            found = next(
                (text for text in texts if any(text in leaf for leaf in _leaves(self._data))), "an added token"
            )
            raise ValueError(
                f"A message holds {found!r}, a token of this vocabulary. Encoding it as text needs a fast tokenizer; "
                f"{type(self._tokenizer).__name__} is none. Take the text out, or load the fast version."
            )

    def _replace(self, value: Any, spans: Spans) -> Any:
        if isinstance(value, str):
            return self._replace_in(value, (start for start, _ in spans(value)))
        if isinstance(value, Mapping):
            return {name: self._replace(item, spans) for name, item in value.items()}
        if isinstance(value, list | tuple):
            texts = [part["text"] for part in value if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
            if len(texts) > 1 and any(
                True for _ in spans("".join(texts))
            ):  # a token may begin in one part and end in the next
                spans = functools.partial(_first_characters, self._tokenizer)
            return [self._replace(item, spans) for item in value]
        return value

    def _replace_in(self, text: str, starts: Iterable[int]) -> str:
        characters = list(text)
        for start in starts:
            characters[start] = self._stand_in(text[start])
        return "".join(characters)

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_ins:
            if self._free is None:
                taken = {c for leaf in _leaves(self._data) for c in leaf}
                self._free = (chr(i) for i in range(_FIRST_STAND_IN, _LAST_STAND_IN) if chr(i) not in taken)
            self._stand_ins[character] = next(self._free)
            self.originals[self._stand_ins[character]] = character
        return self._stand_ins[character]


def _leaves(value: Any) -> Iterator[str]:
    """Every text in a conversation."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


def _spans(tokenizer: Any, pattern: re.Pattern[str] | None, text: str) -> Iterator[tuple[int, int]]:
    """Where a text would be read as one of the tokens of a pattern, also where it only becomes one when it is normalised."""
    if pattern is None:
        return
    last = 0
    for match in pattern.finditer(text):
        yield match.span()
        last = match.end()
    if last == 0 and text and _normalizes_added_tokens(tokenizer):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        added = tokenizer.added_tokens_decoder
        for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in added and pattern.fullmatch(str(added[token])):
                yield tuple(span)


def _first_characters(tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Every character that could be the first of an added token."""
    firsts = _once(tokenizer, "firsts", lambda: {text[0] for text in _added_texts(tokenizer)})
    return ((index, index + 1) for index, character in enumerate(text) if character in firsts)


def _replace_stand_ins(
    tokenizer: Any, encoded: Mapping[str, Any], text: str, originals: Mapping[str, str]
) -> dict[str, list[int]]:
    """Put the plain tokens of the originals where the stand-ins' tokens are; every per-token list stays in step."""
    offsets = encoded["offset_mapping"]
    columns = {name: list(values) for name, values in encoded.items() if name != "offset_mapping"}
    replaced: dict[str, list[int]] = {name: [] for name in columns}
    index = count = 0
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
        count += sum(character in originals for character in text[start:end])
        plain = "".join(originals.get(character, character) for character in text[start:end])
        ids = _encode_plainly(tokenizer, plain)
        for name, values in columns.items():
            replaced[name] += ids if name == "input_ids" else [values[first]] * len(ids)
    if count != sum(character in originals for character in text):
        raise ValueError(
            f"A message holds the text of a token of this vocabulary, and {type(tokenizer).__name__} drops the characters that would keep it "
            "text. Take it out of the message."
        )
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
    """A pattern for the text of each added token that is more than a character long."""
    return _once(tokenizer, "added", lambda: _pattern(_added_texts(tokenizer)))


def _structural_tokens(tokenizer: Any, template: str | None) -> re.Pattern[str] | None:
    """A pattern for the tokens that structure a conversation: the special ones, and those that the template writes; no think tag."""

    def find() -> re.Pattern[str] | None:
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if getattr(token, "special", False)} | set(
            tokenizer.all_special_tokens
        )
        written = _rendered_probe(tokenizer, template)
        return _pattern({text for text in _added_texts(tokenizer) if text in special or text in written} - _THINK_TAGS)

    return _once(tokenizer, template or str(getattr(tokenizer, "chat_template", None)), find)


def _rendered_probe(tokenizer: Any, template: str | None) -> str:
    if not (template or getattr(tokenizer, "chat_template", None)):
        return ""
    try:
        return render_chat(
            tokenizer, _PROBE, add_generation_prompt=True, **({"chat_template": template} if template else {})
        )
    except ValueError:  # a template for other conversations than this one
        return ""


def _added_texts(tokenizer: Any) -> set[str]:
    """The texts of the added tokens that are more than a character long."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return {text for text in texts if len(text) > 1 and not text.isspace()}


def _pattern(texts: set[str]) -> re.Pattern[str] | None:
    """A pattern for any of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _normalizes_added_tokens(tokenizer: Any) -> bool:
    """Whether a text may be read as an added token that it does not hold to the letter."""

    def find() -> bool:
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        tokens = tokenizer.added_tokens_decoder.values()
        return normalizer is not None and any(getattr(token, "normalized", False) for token in tokens)

    return _once(tokenizer, "normalizes", find)


def _once(tokenizer: Any, name: str, find: Callable[[], Any]) -> Any:
    """What `find` finds out about a tokenizer; found anew when its vocabulary has grown."""
    known = _KNOWN.setdefault(tokenizer, {})
    key = (name, len(tokenizer))
    if key not in known:
        known[key] = find()
    return known[key]


def _without_mask(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "return_assistant_tokens_mask"}
