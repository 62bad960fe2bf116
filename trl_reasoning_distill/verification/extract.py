r"""The final answer in a model's text: `extract_answer(text)`.

Only what stands after the reasoning counts, and there the *last* commitment:

| rule | fires on |
|---|---|
| `hash` | a line `#### 42` |
| `boxed` | the last `\boxed{…}`; neighbours such as `\boxed{1} and \boxed{2}` together |
| `final_answer` | `Final Answer: …`, `the final answer is …` |
| `answer_is` | `The answer is …`, `Answer: …`, a line `A: …` |
| `whole` | a text that is short enough to be an answer |
| `therefore` | the last `Therefore …`, `Thus …`, `Hence …`: the mathematics or the number in it |
| `math` | the last `$…$`, `\(…\)`, `\[…\]` |
| `last_number` | the last number |
| `unfinished_reasoning` | nothing: the reasoning was opened and never closed |
| `none` | nothing was found |

The first four are equals: whichever stands last wins. If the model takes its answer back ("Wait, …") and goes on to another, the
other one counts. Only the last 50,000 characters are searched, each rule in one pass: no rule backtracks.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from trl_reasoning_distill.data.formatting import iter_boxed

THOUGHT_TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
MAX_ANSWER = 2000
"""Characters; nothing longer is taken for a final answer."""
_MAX_WHOLE = 120
_MAX_TAIL = 50_000  # nobody commits to an answer and then goes on for longer than that
_MAX_PHRASES = 50

NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,])[-+−]?[ ]?[$€£¥]?[ ]?(?:\d{1,3}(?:[, ]\d{3}){1,8}(?!\d)(?:\.\d{1,40})?|\d{1,80}(?:[.,]\d{1,80})?|\.\d{1,80})(?:[eE][-+]?\d{1,4}|/\d{1,80})?"
)
_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_PHRASE = re.compile(
    r"\b(final[ \t]{1,4})?answer[ \t*_)}]{0,6}(?::|=|is\b|would be\b)[ \t*_:]{0,6}|^[ \t]{0,4}A:[ \t]{0,4}",
    re.IGNORECASE | re.MULTILINE,
)
_JUDGEMENT = re.compile(
    r"(?:in)?correct|(?:not )?(?:right|wrong|valid|reasonable|unique|plausible)|(?:verified|confirmed|consistent|clear|obvious|found|given|obtained|as|the same)\b[^\d$\\]*",
    re.IGNORECASE,
)
_CHECK = re.compile(r"\b(?:check|verify|confirm)(?:ing)? (?:our|the|this|that|my|your) $", re.IGNORECASE)
_THEREFORE = re.compile(r"\b(?:therefore|thus|hence)\b[ \t,:]{0,4}", re.IGNORECASE)
_RETRACTION = re.compile(
    r"\b(?:wait|hold on|scratch that|correction|i made (?:a|an) (?:mistake|error)|that(?:'s| is) (?:wrong|not right|incorrect))\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z*]|\s*$)|\n")
_HEADING = re.compile(r"\d{1,3}[.):]\s+[A-Za-z]|(?:step|part|case)\b", re.IGNORECASE)
_JOINT = re.compile(r",|;|\b(?:and|or)\b")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mbox|textnormal)[ ]{0,2}\{[^{}]{0,200}\}")
_MATH_MARK = re.compile(r"\\\(|\\\)|\\\[|\\\]|\\\$|\$\$|\$")


@dataclass(frozen=True)
class ExtractedAnswer:
    """The answer as the text has it (`None` if there is none), and the rule that found it."""

    answer: str | None
    rule: str


def extract_answer(text: str) -> ExtractedAnswer:
    """Find the final answer in a model's text; see the module for the rules.

    Never raises, whatever the text.
    """
    committed = committed_text(text)
    if committed is None:
        return ExtractedAnswer(None, "unfinished_reasoning")
    committed = committed[-_MAX_TAIL:]
    found = _last_marked(committed)
    if found is None:
        return _extract_unmarked(committed)
    end, answer, rule = found
    withdrawn = deque(_RETRACTION.finditer(committed, end), maxlen=1)
    if withdrawn:
        later = _last_math_or_number(committed[withdrawn[0].end() :])
        if later.answer is not None:
            return later
    return ExtractedAnswer(answer, rule)


def committed_text(text: str) -> str | None:
    """What follows the reasoning: all of the text if it has no tags, `None` if the reasoning never ended."""
    for open_tag, close_tag in THOUGHT_TAGS:
        opened, closed = text.rfind(open_tag), text.rfind(close_tag)
        if opened > closed:
            return None
        if closed >= 0:
            text = text[closed + len(close_tag) :]
    return text


def math_segments(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Each `$…$`, `$$…$$`, `\(…\)` and `\[…\]`: start, end, content; an amount such as `$5` opens nothing.

    A single `$` opens where a non-space follows and closes where a non-space precedes and no digit follows, as in Pandoc.
    """
    closing = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
    opened: tuple[str, int, int] | None = None
    for mark in _MATH_MARK.finditer(text):
        token, start, end = mark.group(), mark.start(), mark.end()
        if token == "\\$":
            continue
        closes = token != "$" or (not text[start - 1].isspace() and not text[end : end + 1].isdigit())
        if closes and opened is not None and token == closing[opened[0]]:
            yield opened[1], end, text[opened[2] : start].strip()
            opened = None
            continue
        if token in closing and (opened is None or opened[0] == "$"):
            opens = token != "$" or not text[end : end + 1].isspace()
            opened = (token, start, end) if opens else opened


def is_short(text: str) -> bool:
    """Whether a text can be an answer as it stands: one short line of mathematics, a number with its unit, or up to three words."""
    if len(text) > _MAX_WHOLE or "\n" in text:
        return False
    return len(_WORD.findall(_TEXT_MACRO.sub(" ", text))) <= 3


def _last_marked(text: str) -> tuple[int, str, str] | None:
    """The last answer that a marker announces: where it ends, the answer, the rule."""
    candidates = [
        candidate for candidate in (_last_hash(text), _last_boxes(text), _last_phrase(text)) if candidate is not None
    ]
    return max(candidates, key=lambda candidate: candidate[0]) if candidates else None


def _last_hash(text: str) -> tuple[int, str, str] | None:
    last = None
    text_end = len(text.rstrip())
    for match in _HASH.finditer(text):
        answer = _clean(match.group(1))
        is_last_line = match.end() >= text_end
        if answer and (is_last_line or (NUMBER.match(answer) and not _HEADING.match(answer))):
            last = (match.end(), answer, "hash")
    return last


def _last_boxes(text: str) -> tuple[int, str, str] | None:
    """The last outermost box, with the boxes before it that belong to the same answer."""
    outermost: list[tuple[int, int, int]] = []
    for box in iter_boxed(text):
        while outermost and outermost[-1][0] > box[0]:
            outermost.pop()
        outermost.append(box)
    if not outermost:
        return None
    contents = [text[outermost[-1][1] : outermost[-1][2]].strip()]
    for before, after in zip(outermost[-2::-1], outermost[:0:-1], strict=False):
        gap = text[before[2] + 1 : after[0]]
        if len(gap) > 60 or _RETRACTION.search(gap) or (_WORD.search(gap) and not _JOINT.search(gap)):
            break
        contents.insert(0, text[before[1] : before[2]].strip())
    answer = ", ".join(dict.fromkeys(contents))
    return (outermost[-1][2] + 1, answer, "boxed") if answer else None


def _last_phrase(text: str) -> tuple[int, str, str] | None:
    for match in reversed(deque(_PHRASE.finditer(text), maxlen=_MAX_PHRASES)):
        payload, _, rest = text[match.end() : match.end() + MAX_ANSWER].partition("\n")
        if not payload.strip(" *_"):  # the answer stands on the next line
            payload = rest.lstrip().partition("\n")[0]
        answer = _sentence(payload)
        if not {":", "="} & set(match.group()) and _JUDGEMENT.fullmatch(answer):  # `so our answer is correct`
            continue
        if _CHECK.search(text, max(0, match.start() - 20), match.start()):  # `we check our answer: 17 · 44 = 748`
            continue
        if (
            answer
            and "\\boxed" not in answer
            and (is_short(answer) or any(math_segments(answer)) or NUMBER.search(answer))
        ):
            end = text.find(answer, match.end()) + len(answer)
            return end, answer, "final_answer" if match.group(1) else "answer_is"
    return None


def _extract_unmarked(text: str) -> ExtractedAnswer:
    """The weak rules, for a text in which nothing announces the answer."""
    whole = _clean(text)
    if whole and is_short(whole):
        return ExtractedAnswer(whole, "whole")
    therefore = deque(_THEREFORE.finditer(text), maxlen=1)
    if therefore:
        sentence = _sentence(text[therefore[0].end() : therefore[0].end() + MAX_ANSWER])
        found = _last_math_or_number(sentence)
        if found.answer is not None:
            return ExtractedAnswer(found.answer, "therefore")
        if sentence and is_short(sentence):
            return ExtractedAnswer(sentence, "therefore")
    return _last_math_or_number(text)


def _last_math_or_number(text: str) -> ExtractedAnswer:
    segment = next(iter(deque(math_segments(text), maxlen=1)), None)
    number = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    if segment is not None and segment[2] and (number is None or segment[1] >= number.end()):
        return ExtractedAnswer(segment[2][:MAX_ANSWER], "math")
    if number is not None:
        percent = re.match(r"[ ]?(?:\\?%|percent\b|pct\b)", text[number.end() : number.end() + 12])
        return ExtractedAnswer((number.group() + (percent.group() if percent else "")).strip(), "last_number")
    return ExtractedAnswer(None, "none")


def _sentence(text: str) -> str:
    """The first sentence of a payload, cleaned."""
    text = text.lstrip()
    end = _SENTENCE_END.search(text)
    return _clean(text[: end.start()] if end else text)


def _clean(text: str) -> str:
    """Without the marks around it that are no part of an answer: emphasis, quotes, a full stop."""
    text = text.strip().strip("*_\"'`“” \t\n")
    return text[:-1].rstrip("*_ ") if text.endswith(".") and not text.endswith("..") else text
