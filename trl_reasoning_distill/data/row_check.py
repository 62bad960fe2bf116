"""Does a tokenized row train what its text holds? One check for every stage that renders rows.

After the chat template has rendered a row, each supervised reply and its reasoning must stand in the supervised tokens, in order and once,
and nothing else of weight; and the thought must be well formed. White space and the template's own marks count for nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import TokenizedExample, is_supervised

_ROLE_WORDS = frozenset({"assistant", "model", "bot", "analysis", "commentary", "final"})
_LONGEST_MARK = 24
_MARK = "\0"  # stands for a token of the vocabulary's own, or a tag, while texts are compared
_BEFORE = 16  # tokens that are read to see whether the prompt opens the thought
_SHOWN = 160
_DROPS_THOUGHT = re.compile(r"[\w.\[\]'\"]+\.split\(\s*['\"]</think>['\"]\s*\)\s*\[-1\](?:\.\w+\([^()]*\))*")


@dataclasses.dataclass(frozen=True)
class RowFinding:
    """What was found of one row.

    Attributes:
        has_reasoning: Whether what is supervised holds a reasoning.
        damage: What the template does to the row, and the two texts side by side; `None` if they agree.
        malformed: What is wrong with the thought as it was written; `None` if nothing is.
    """

    has_reasoning: bool = False
    damage: str | None = None
    malformed: str | None = None


@dataclasses.dataclass(frozen=True)
class RowCheck:
    """Compares a row's text with its tokens.

    Attributes:
        tokenizer: Made the tokens.
        form: How a thought is tagged.
        chat_template: The template that rendered the row, if it is not the tokenizer's own.
        whole: Whether more than the replies is supervised because it was asked for.
    """

    tokenizer: Any
    form: ReasoningFormat
    chat_template: str | None = None
    whole: bool = False

    def __call__(self, example: Mapping[str, Any], tokens: TokenizedExample) -> RowFinding:
        """Look at one row.

        Args:
            example: Its text, as `tokenize_example` takes it; or a row that came as tokens, of which only the thought is read.
            tokens: What became of it.
        """
        ids = tokens.input_ids
        if self._doubles_bos(ids):
            bos = self.tokenizer.bos_token
            return RowFinding(damage=f"begins with {bos!r} twice. Take it out of the text: the tokenizer adds it")
        runs = [self._read(ids, start, end) for start, end in _supervised_runs(tokens.labels)]
        has_reasoning = any(bool(self.form.parse(text, opened=opened).reasoning) for text, opened in runs)
        replies = _replies(example)
        if not runs or replies is None:
            return RowFinding(has_reasoning)
        pairs = list(zip(replies, runs, strict=True)) if len(replies) == len(runs) and not self.whole else []
        if damage := self._damage(replies, runs):
            shown = " ".join(_written(reply) for reply in replies)
            return RowFinding(
                has_reasoning,
                f"{damage}. The row: {_ends(shown)!r}. Its supervised tokens: {_ends(' '.join(t for t, _ in runs))!r}",
            )
        judged = [(text, opened, bool(reply.get("tool_calls"))) for reply, (text, opened) in pairs] or [
            (str(reply["content"]), False, bool(reply.get("tool_calls"))) for reply in replies
        ]
        faults = (self._fault(text, opened, calls) for text, opened, calls in judged)
        return RowFinding(has_reasoning, None, next((fault for fault in faults if fault), None))

    def _read(self, ids: Sequence[int], start: int, end: int) -> tuple[str, bool]:
        """A run of supervised tokens as text, and whether what stands before it has opened the thought."""
        before = self.tokenizer.decode(ids[max(0, start - _BEFORE) : start])
        return self.tokenizer.decode(ids[start:end]), self.form.is_opened_by(before)

    def _doubles_bos(self, ids: Sequence[int]) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos

    # Text against tokens

    def _damage(self, replies: Sequence[Mapping[str, Any]], runs: Sequence[tuple[str, bool]]) -> str | None:
        found = self._comparable("".join(text for text, _ in runs))
        position = 0
        between = []
        for reply in replies:
            for piece in self._pieces(reply):
                start, length = self._find(piece, found, position)
                if start < 0:
                    return (
                        f"{'doubles or moves' if self._find(piece, found, 0)[0] >= 0 else 'drops'} {_ends(piece, 60)!r}"
                    )
                between.append(found[position:start])
                position = start + length
        between.append(found[position:])
        if damage := self._tag_damage(replies, runs):
            return damage
        if self.whole or any(reply.get("tool_calls") for reply in replies):
            return None
        stray = next((text for gap in between for text in self._strays(gap)), None)
        return None if stray is None else f"supervises {_ends(stray, 60)!r}, which is no part of the reply"

    def _find(self, piece: str, found: str, position: int) -> tuple[int, int]:
        """Where a piece stands and how long it is there; −1 if it does not. A tokenizer may not hold every character."""
        wanted = self._comparable(piece)
        start = found.find(wanted, position)
        if start < 0:
            held = self.tokenizer.decode(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
            wanted = self._comparable(held)
            start = found.find(wanted, position)
        return start, len(wanted)

    def _pieces(self, reply: Mapping[str, Any]) -> list[str]:
        """The texts that must be there: what the tags part, and the names of the tools that are called."""
        content = str(reply["content"])
        pieces = self._tag_pattern.split(content) if self._tag_pattern else [content]
        calls = [call.get("function") or call for call in reply.get("tool_calls") or []]
        return [piece for piece in pieces if piece.strip()] + [str(call["name"]) for call in calls if call.get("name")]

    def _tag_damage(self, replies: Sequence[Mapping[str, Any]], runs: Sequence[tuple[str, bool]]) -> str | None:
        if not self.form.open_tag:
            return None
        for tag, opened in ((self.form.open_tag, sum(opened for _, opened in runs)), (self.form.close_tag, 0)):
            written = sum(str(reply["content"]).count(tag) for reply in replies)
            trained = sum(text.count(tag) for text, _ in runs) + opened
            if trained < written:
                return f"drops {tag}"
            if (
                trained > written
                and written
                and any(self.form.parse(str(reply["content"])).well_formed for reply in replies)
            ):
                return f"doubles {tag}"
        return None

    def _strays(self, gap: str) -> Iterator[str]:
        """What of the text between the pieces is neither a token of the vocabulary's own nor a mark of the template."""
        for text in gap.split(_MARK):
            if not re.search(r"\w", text) or text.lower() in _ROLE_WORDS:
                continue
            if len(text) > _LONGEST_MARK or text not in self._template_text:
                yield text

    @functools.cached_property
    def _tag_pattern(self) -> re.Pattern[str] | None:
        tags = [tag for tag in (self.form.open_tag, self.form.close_tag) if tag]
        return re.compile("|".join(map(re.escape, tags))) if tags else None

    def _comparable(self, text: str) -> str:
        """A text without white space, and with one mark for each token of the vocabulary's own and each tag."""
        return _squeeze(self._mark_pattern.sub(_MARK, text))

    @functools.cached_property
    def _mark_pattern(self) -> re.Pattern[str]:
        marks = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        marks |= {*self.tokenizer.all_special_tokens, self.form.open_tag, self.form.close_tag, "<think>", "</think>"}
        written = sorted((mark for mark in marks if mark.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, written)))

    @functools.cached_property
    def _template_text(self) -> str:
        template = self.chat_template or self.tokenizer.chat_template or ""
        return _squeeze(str(template).replace("\\n", ""))

    # The thought

    def _fault(self, text: str, opened: bool, calls_tool: bool) -> str | None:
        """What is wrong with a thought; `None` without one, or if it is well formed."""
        open_tag, close_tag = self.form.open_tag, self.form.close_tag
        if not open_tag or not (opened or open_tag in text or close_tag in text):
            return None
        parsed = self.form.parse(text, opened=opened)
        if parsed.well_formed:
            answer = self._comparable(parsed.answer or "").strip(_MARK)
            return None if answer or calls_tool else f"nothing follows {close_tag}"
        opens, closes = text.count(open_tag) + opened, text.count(close_tag)
        if not closes:
            return f"the thought never ends: there is no {close_tag}"
        if not opens:
            return f"{close_tag} ends a thought that {open_tag} never began"
        if opens > 1 or closes > 1:
            return f"{max(opens, closes)} thoughts instead of one"
        if not opened and text[: text.find(open_tag)].strip():
            return f"text stands before {open_tag}"
        return None if calls_tool else f"nothing follows {close_tag}"


def _supervised_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where each unbroken run of supervised positions starts and ends."""
    mask = np.concatenate([[False], is_supervised(np.asarray(labels, np.int64)), [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(mask)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _replies(example: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The replies of a row that are to be learnt; `None` where its text does not mark them, as of plain text and of tokens."""
    if "input_ids" in example:
        return None
    turns = example.get("completion") if "prompt" in example else example.get("messages")
    if isinstance(turns, str):
        return [{"role": "assistant", "content": turns}]
    return None if turns is None else [turn for turn in turns if turn["role"] == "assistant"]


def _written(reply: Mapping[str, Any]) -> str:
    return str(reply["content"])


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _ends(text: str, limit: int = _SHOWN) -> str:
    """A text, or its two ends."""
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-(limit // 2) :]}"


def advise(template: str | None) -> str:
    """How to mend a template that loses the reasoning, as specifically as its text allows."""
    found = _DROPS_THOUGHT.search(template or "")
    if found is None:
        return "Give a template that keeps what the assistant wrote, with chat_template_path."
    expression = found.group()
    content = expression.partition(".split(")[0]
    return (
        f"It does so with `{expression}`: copy the template to a .jinja file, write `{content}` in that place, and give the file as "
        "chat_template_path."
    )
