r"""The final answer in a model's text: `extract_answer(text)`.

Only what stands after the reasoning counts, and there the *last* commitment:

| rule | fires on |
|---|---|
| `answer_tag` | `<answer>70</answer>` |
| `hash` | a line `#### 42` |
| `boxed` | the last `\boxed{…}`; neighbours such as `\boxed{1} and \boxed{2}` together |
| `final_answer` | `Final Answer: …`, `the final answer is …`, `最终答案是…` |
| `answer_is` | `The answer is …`, `Answer: …`, a line `A: …`; `答案是…`, `la réponse est …`, `die Antwort ist …`, `Ответ: …` |
| `choice` | `The correct option is (C)`, `故选 B` |
| `whole` | a text that is short enough to be an answer |
| `lines` | a first or last line that is an answer by itself; several of them are several answers |
| `therefore` | the last `Therefore …`, `Thus …`, `Hence …`: the mathematics or the number in it |
| `math` | the last `$…$`, `\(…\)`, `\[…\]` |
| `last_number` | the last number |
| `unfinished_reasoning` | nothing: the reasoning was opened and never closed |
| `none` | nothing was found |

The first six are equals: whichever stands last wins. If the model takes its answer back ("Wait, …") and goes on to another, the other one counts; if
it goes on to a new question (`Question: …`), nothing after that counts. Commitments that stand side by side with different answers are several
candidates, and are returned together. Only the last 50,000 characters are searched, each rule in one pass: no rule backtracks.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from trl_reasoning_distill.data.formatting import iter_boxed
from trl_reasoning_distill.verification.phrases import (
    AFFIRMED,
    BEFORE_A_NUMBER,
    BEHIND_A_NUMBER,
    CHOICE_PHRASE,
    CHOICE_TRIGGERS,
    COMPOUND,
    COPULA,
    DOUBTED,
    HAN_SENTENCE,
    HEDGED,
    INVERTED,
    JUDGEMENT,
    NEW_QUESTION,
    OPTIONS,
    REASON,
    REFUSAL,
    REJECTED,
    RETRACTION,
    SENTENCE_END,
    SUPPOSED,
    THEREFORE,
    TROUBLED,
    announcements,
)
from trl_reasoning_distill.verification.vocabulary import STATEMENTS

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
_ANSWER_TAG = re.compile(r"<answer>[ \t]*|</answer>", re.IGNORECASE)
_HEADING = re.compile(r"\d{1,3}[.):]\s+[A-Za-z]|(?:step|part|case)\b", re.IGNORECASE)
_JOINT = re.compile(r"(?:,|;|&|\b(?:and|or|und|oder|et|ou|и|или)\b|[和或、，])[\s$\\()\[\]}]*$")
_JOINT_WORDS = re.compile(r"(?:\b(?:and|or|und|oder|et|ou)\b|[和或、，])\s*$")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|mathrm|mbox|textnormal)[ ]{0,2}\{([^{}]{0,200})\}")
_MATH_MARK = re.compile(r"\\\(|\\\)|\\\[|\\\]|\\\$|\$\$|\$")
_SPECIAL_TOKEN = re.compile(r"<\|(?!im_start\|>user|endoftext|eot_id)[A-Za-z_]{1,30}\|>")
_ESCAPED_TWICE = re.compile(r"(?<!\\)\\{2}(?:boxed|text|frac|sqrt)\{")
_BROKEN_MATH = re.compile(r"(?:(?<!\$)\$|\\\()[ \t]*\n[^$\n]{0,200}\n[ \t]*(?:\$(?!\$)|\\\))")


@dataclass(frozen=True)
class ExtractedAnswer:
    """The answer as the text has it (`None` if there is none), and the rule that found it."""

    answer: str | None
    rule: str


@dataclass(frozen=True)
class _Commitment:
    """An answer that something announces: where its announcement begins, where it ends, and by which rule."""

    start: int
    end: int
    answer: str
    rule: str


def extract_answer(text: str) -> ExtractedAnswer:
    """Find the final answer in a model's text; see the module for the rules.

    Never raises, whatever the text.
    """
    committed = committed_text(text)
    if committed is None:
        return ExtractedAnswer(None, "unfinished_reasoning")
    committed = unescaped(committed[-_MAX_TAIL:])
    found = _last_marked(committed)
    if found is None:
        return _extract_unmarked(committed)
    run_on = NEW_QUESTION.search(committed)
    if run_on is not None and run_on.start() and (first := _last_marked(committed[: run_on.start()])) is not None:
        return ExtractedAnswer(first.answer, first.rule)
    return _unless_withdrawn(committed, found)


def _unless_withdrawn(text: str, found: _Commitment) -> ExtractedAnswer:
    """The answer, or the one that follows where the model takes it back."""
    withdrawn = next(iter(deque(RETRACTION.finditer(text, found.end), maxlen=1)), None)
    if withdrawn is not None:
        after = text[withdrawn.end() :]
        if not AFFIRMED.search(after) or TROUBLED.search(text[withdrawn.start() :]):
            later = _last_math_or_number(after)
            if later.answer is not None:
                return later
    return ExtractedAnswer(found.answer, found.rule)


def committed_text(text: str) -> str | None:
    """What follows the reasoning: all of the text if it has no tags, `None` if the reasoning never ended."""
    for open_tag, close_tag in THOUGHT_TAGS:
        opened, closed = text.rfind(open_tag), text.rfind(close_tag)
        if opened > closed:
            return None
        if closed >= 0:
            text = text[closed + len(close_tag) :]
    return text


def unescaped(text: str) -> str:
    r"""A text that was escaped twice on its way (`\\boxed`, `\n` as two characters) as it was meant, without a chat's special tokens."""
    if "<|" in text:
        text = _SPECIAL_TOKEN.sub("\n", text)
    if not _ESCAPED_TWICE.search(text):
        return text
    return re.sub(r"(?<!\\)\\n(?![a-z])", "\n", re.sub(r"(?<!\\)\\{2}(?=[A-Za-z])", r"\\", text))


def math_segments(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Each `$…$`, `$$…$$`, `\(…\)` and `\[…\]`: start, end, content; an amount such as `$5` opens nothing.

    A single `$` opens where a non-space follows and closes where a non-space precedes and no digit follows, as in Pandoc; or with a space inside both,
    on one line and without words.
    """
    closing = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
    opened: tuple[str, int, int] | None = None
    for mark in _MATH_MARK.finditer(text):
        token, start, end = mark.group(), mark.start(), mark.end()
        if token == "\\$":
            continue
        closes = token != "$" or (not text[start - 1].isspace() and not text[end : end + 1].isdigit())
        if not closes and opened is not None and opened[0] == "$":
            closes = _is_spaced_math(text[opened[2] : min(start, opened[2] + MAX_ANSWER)])
        elif closes and opened is not None and opened[0] == token == "$" and text[opened[2] : opened[2] + 1].isspace():
            closes = False
        if closes and opened is not None and token == closing[opened[0]]:
            yield opened[1], end, text[opened[2] : start].strip()
            opened = None
            continue
        if token in closing and (opened is None or opened[0] == "$"):
            opened = (token, start, end)


def _is_spaced_math(content: str) -> bool:
    """Whether what stands between `$ ` and ` $` is mathematics."""
    return (
        content[:1] == " " == content[-1:]
        and "\n" not in content
        and not _WORD.search(re.sub(r"\\(?:begin|end)\{\w+\*?\}(?:\{\w*\})?", "", content))
    )


def is_short(text: str) -> bool:
    """Whether a text can be an answer as it stands: one short line of mathematics, a number with its unit, or up to three words."""
    if len(text) > _MAX_WHOLE or "\n" in text:
        return False
    return len(_WORD.findall(_TEXT_MACRO.sub(" ", text))) <= 3


def rule_answers(text: str) -> dict[str, str]:
    """What each rule that reads a marker finds by itself, by the rule's name: where two differ, a text commits to two answers."""
    committed = committed_text(text)
    if committed is None:
        return {}
    return {found.rule: found.answer for found in _marked(unescaped(committed[-_MAX_TAIL:]))}


def _last_marked(text: str) -> _Commitment | None:
    """The last answer that a marker announces."""
    return max(_marked(text), key=lambda found: found.end, default=None)


def _marked(text: str) -> list[_Commitment]:
    """The last answer of each kind of marker."""
    lowered = text.lower()
    finders = (
        ("<answer>", _last_tag),
        ("####", _last_hash),
        ("box", _last_boxes),
    )
    candidates = [found for trigger, finder in finders if trigger in lowered and (found := finder(text)) is not None]
    candidates += [
        found for finder in (_last_phrase, _last_inverted, _last_choice) if (found := finder(text, lowered)) is not None
    ]
    return candidates


def _last_tag(text: str) -> _Commitment | None:
    """The last `<answer>`; its content is a text that may mark its answer in turn."""
    opened, found = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if tag[0][1] != "/":
            opened = tag
        elif opened is not None:
            found, opened = (opened.start(), opened.end(), tag.start(), tag.end()), None
    if opened is not None:
        found = (opened.start(), opened.end(), len(text), len(text))
    if found is None or not text[found[1] : found[2]].strip():
        return None
    content = text[found[1] : found[2]].strip()
    inner = max(
        (
            c
            for c in (_last_boxes(content), _last_hash(content), _last_phrase(content, content.lower()))
            if c is not None
        ),
        key=lambda c: c.end,
        default=None,
    )
    return _Commitment(found[0], found[3], inner.answer if inner is not None else _clean(content), "answer_tag")


def _last_hash(text: str) -> _Commitment | None:
    """The last `####` with an answer; lines that follow each other and differ are several."""
    found: list[_Commitment] = []
    text_end = len(text.rstrip())
    is_answer = False
    for match in _HASH.finditer(text):
        answer = _clean(match.group(1))
        if not answer:
            continue
        commits = match.end() >= text_end or (NUMBER.match(answer) and not _HEADING.match(answer))
        is_side_by_side = bool(found) and not text[found[-1].end : match.start()].strip()
        commitment = _Commitment(match.start(), match.end(), answer, "hash")
        if is_side_by_side and not _HEADING.match(found[-1].answer) and is_short(found[-1].answer):
            found = [*found[-_MAX_PHRASES:], commitment]
            is_answer = is_answer or bool(commits)
        elif commits or not is_answer:
            found, is_answer = [commitment], bool(commits)
    return _together(found) if is_answer else None


def _together(found: list[_Commitment]) -> _Commitment | None:
    """Commitments side by side: one, if they agree."""
    if not found:
        return None
    answers = list(dict.fromkeys(commitment.answer for commitment in found))
    return _Commitment(found[0].start, found[-1].end, ", ".join(answers)[: MAX_ANSWER + 1], found[-1].rule)


def _last_boxes(text: str) -> _Commitment | None:
    """The last outermost box, with the boxes before it that belong to the same answer."""
    outermost: list[tuple[int, int, int]] = []
    for box in iter_boxed(text):
        while outermost and outermost[-1][0] > box[0]:
            outermost.pop()
        outermost.append(box)
    if not outermost:
        return None
    contents = [text[outermost[-1][1] : outermost[-1][2]].strip()]
    start = outermost[-1][0]
    for before, after in zip(outermost[-2::-1], outermost[:0:-1], strict=False):
        gap = text[before[2] + 1 : after[0]]
        if len(gap) > 60 or RETRACTION.search(gap) or not _joins(gap):
            break
        contents.insert(0, text[before[1] : before[2]].strip())
        start = before[0]
    contents = contents[:1] if len(set(contents)) == 1 else contents
    answer = ", ".join(contents)
    return _Commitment(start, outermost[-1][2] + 1, answer, "boxed") if answer else None


def _joins(gap: str) -> bool:
    """Whether two boxes with this between them are one answer: no words, or a few nouns and an `and` at the end."""
    plain = re.sub(r"\\q?quad|\\[,;: ]", " ", _TEXT_MACRO.sub(r" \1 ", gap))
    if not _WORD.search(re.sub(r"\\[A-Za-z]+", " ", plain)):
        return "." not in plain or "\n" not in plain
    tail = plain.rstrip(" $\\()[]{}\n")
    if (
        _JOINT.search(plain) is None
        and not _JOINT_WORDS.search(tail)
        and re.search(r"(?:,|;|\band\b|\bor\b)[^,;]{0,30}=\s*$", tail) is None
    ):
        return False
    words = _WORD.findall(tail)
    return len(words) <= 5


def _last_phrase(text: str, lowered: str) -> _Commitment | None:
    found: list[_Commitment] = []
    for match in reversed(announcements(text, lowered, _MAX_PHRASES)):
        commitment = _phrase_answer(text, match, found[0].start if found else len(text))
        if commitment is None:
            continue
        if found and not _is_side_by_side(text[commitment.end : found[0].start]):
            break
        found.insert(0, commitment)
    return _together(found)


_BEFORE_THE_NEXT = re.compile(
    r"[ \t,;]{0,4}\b(?:or|and|also|maybe)?[ \t,]{0,4}\b(?:the|my|another)?[ \t]{0,4}$", re.IGNORECASE
)


def _is_side_by_side(gap: str) -> bool:
    return len(gap) < 30 and not re.sub(
        r"(?i)\b(?:the|and|or|also|maybe|final|my|another|possible|answer)\b|[\s.,;:*]", "", gap
    )


def _phrase_answer(text: str, match: re.Match[str], limit: int) -> _Commitment | None:
    """What one `the answer is` announces before `limit`, where the next one begins, if it announces anything."""
    before = text[max(0, match.start() - 40) : match.start()]
    if HEDGED.search(before):  # `we check our answer: 17 · 44 = 748`, `if the answer is 5`
        return None
    announced = text[match.end() : min(match.end() + MAX_ANSWER, limit)]
    if limit < len(text):
        announced = _BEFORE_THE_NEXT.sub("", announced)
    payload, _, rest = announced.partition("\n")
    if not payload.strip(" *_"):  # the answer stands on the next line
        payload = rest.lstrip().partition("\n")[0]
    answer, is_question = _sentence(payload)
    if not {":", "=", "："} & set(match.group()) and JUDGEMENT.fullmatch(answer):  # `so our answer is correct`
        return None
    if is_question or not answer or "\\boxed" in answer:
        return None
    if REJECTED.match(
        text[match.end() + payload.find(answer) + len(answer) : match.end() + len(payload) + 40].lstrip(" .,;")
    ):
        return None
    answer = _narrowed(answer)
    if is_short(answer) or any(math_segments(answer)) or NUMBER.search(answer):
        end = text.find(answer, match.end()) + len(answer)
        return _Commitment(
            match.start(),
            max(end, match.end()),
            answer,
            "final_answer" if match.groupdict().get("final") else "answer_is",
        )
    return None


def _last_inverted(text: str, lowered: str) -> _Commitment | None:
    """`42 is the answer`."""
    match = next(iter(deque(INVERTED.finditer(text), maxlen=1)), None) if "answer" in lowered else None
    if (
        match is None
        or HEDGED.search(text[max(0, match.start() - 40) : match.start()])
        or BEFORE_A_NUMBER.search(text[max(0, match.start() - 40) : match.start()])
    ):
        return None
    ending = SENTENCE_END.search(text, match.end())
    if "boxed" in match["answer"] or "?" in text[match.end() : ending.end() if ending else len(text)]:
        return None
    return _Commitment(match.start(), match.end(), _clean(match["answer"]), "answer_is")


def _last_choice(text: str, lowered: str) -> _Commitment | None:
    if not any(trigger in lowered for trigger in CHOICE_TRIGGERS):
        return None
    match = next(iter(deque(CHOICE_PHRASE.finditer(text), maxlen=1)), None)
    if match is None or HEDGED.search(text[max(0, match.start() - 40) : match.start()]):
        return None
    answer, is_question = _sentence(text[match.start("letter") : match.start("letter") + MAX_ANSWER])
    if is_question or not answer:
        return None
    return _Commitment(match.start(), match.start("letter") + len(answer), answer, "choice")


def _narrowed(answer: str) -> str:
    """The predicate of a sentence, `19` in `the largest number of them is 19`; other answers stay."""
    answer = REASON.split(answer, maxsplit=1)[0].rstrip(" ,(") or answer
    if is_short(answer) and not COPULA.search(answer) and not HAN_SENTENCE.match(answer):
        return answer
    plain = "".join(" " * len(c) if c.startswith("$") else c for c in re.split(r"(\$[^$]*\$)", answer))
    copula = next(iter(deque(COPULA.finditer(plain), maxlen=1)), None)
    if copula is not None:
        predicate = answer[copula.end() :].strip()
        negated = re.match(r"(?:not|n't|never)\b", predicate)
        if (
            predicate
            and not negated
            and len(_WORD.findall(answer[: copula.start()])) >= 1
            and (NUMBER.search(predicate) or any(math_segments(predicate)))
        ):
            return _clean(predicate)
    if (is_short(answer) and not HAN_SENTENCE.match(answer)) or any(math_segments(answer)):
        return answer
    numbers = list(NUMBER.finditer(answer))
    is_prose = numbers and (len(_WORD.findall(answer[: numbers[0].start()])) >= 2 or HAN_SENTENCE.match(answer))
    if len(numbers) == 1 and "\\" not in answer and is_prose:
        return _number_phrase(answer, numbers[0])
    return answer


def _extract_unmarked(text: str) -> ExtractedAnswer:
    """The weak rules, for a text in which nothing announces the answer."""
    if len(OPTIONS.findall(text[:MAX_ANSWER])) > 1 or (REFUSAL.search(text) and NUMBER.search(text)):
        return ExtractedAnswer(None, "none")
    text = _BROKEN_MATH.sub(" ", text)
    whole = _clean(text)
    if whole.lower() in STATEMENTS:
        return ExtractedAnswer(whole, "whole")
    if whole and is_short(whole):
        return ExtractedAnswer(whole, "whole") if not DOUBTED.search(whole) else ExtractedAnswer(None, "none")
    lines = _lines(text)
    if lines is not None:
        return lines
    therefore = deque(THEREFORE.finditer(text), maxlen=1)
    if therefore:
        sentence, is_question = _sentence(text[therefore[0].end() : therefore[0].end() + MAX_ANSWER])
        found = _last_math_or_number(sentence) if not is_question else ExtractedAnswer(None, "none")
        if found.answer is not None:
            return ExtractedAnswer(found.answer, "therefore")
        if sentence and is_short(sentence) and not is_question:
            return ExtractedAnswer(sentence, "therefore")
    return _last_math_or_number(text)


_BARE_NUMBER = re.compile(r"[-+−]?[$€£¥]?\d[\d,.]{0,30}(?: ?%| ?[A-Za-z]{1,12}(?: [a-z]{1,12})?)?\.?|\(?[A-J]\)?\.?")


def _lines(text: str) -> ExtractedAnswer | None:
    """`42`, and then a sentence; or prose, and then `42`. Lines that are all answers are several."""
    lines = [line.strip().strip("*_ ") for line in text.strip().splitlines()]
    lines = [line for line in lines if line]
    if len(lines) < 2:
        first = SENTENCE_END.split(text.strip(), maxsplit=1)[0].strip() if lines else ""
        is_bare = len(first) <= 60 and _BARE_NUMBER.fullmatch(first) is not None
        return ExtractedAnswer(_clean(first), "lines") if is_bare else None
    bare = [
        len(line) <= 60 and _BARE_NUMBER.fullmatch(line) is not None
        for line in (lines if len(lines) < 200 else (lines[0], lines[-1]))
    ]
    if all(bare):
        answers = list(dict.fromkeys(map(_clean, lines[-_MAX_PHRASES:])))
        return ExtractedAnswer("; ".join(answers), "lines")
    if bare[-1]:
        return ExtractedAnswer(_clean(lines[-1]), "lines")
    return ExtractedAnswer(_clean(lines[0]), "lines") if bare[0] else None


def _last_math_or_number(text: str) -> ExtractedAnswer:
    segment = next(iter(deque(math_segments(text), maxlen=1)), None)
    number = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    last = max(number.end() if number else 0, segment[1] if segment else 0)
    ending = SENTENCE_END.search(text, last)
    if last and "?" in text[last : (ending.end() if ending else len(text))]:  # `Is it 42?`
        return ExtractedAnswer(None, "none")
    begins = segment[0] if segment is not None and segment[1] == last else number.start() if number is not None else 0
    if SUPPOSED.search(text, max(0, begins - 80), begins):
        return ExtractedAnswer(None, "none")
    if segment is not None and segment[2] and (number is None or segment[1] >= number.end()):
        if BEFORE_A_NUMBER.search(text[max(0, segment[0] - 40) : segment[0]]):
            return ExtractedAnswer(text[max(0, segment[0] - 40) : segment[1]].strip()[:MAX_ANSWER], "math")
        return ExtractedAnswer(segment[2][:MAX_ANSWER], "math")
    if number is not None:
        return ExtractedAnswer(_number_phrase(text, number), "last_number")
    return ExtractedAnswer(None, "none")


def _number_phrase(text: str, number: re.Match[str]) -> str:
    """A number with what belongs to it: `not 5`, `5 or 6`, `20 percent`, `5!`, `2 dozen`."""
    start = number.start()
    compound = COMPOUND.search(text[max(0, start - 40) : start])
    if compound is not None and (
        unit := re.match(r" ?[A-Za-z]{1,12}", text[number.end() :])
    ):  # `3 hours and 20 minutes`
        return text[start - len(compound[0]) : number.end() + unit.end()].strip()
    for _ in range(4):  # `not 5 or 6`
        before = BEFORE_A_NUMBER.search(text[max(0, start - 40) : start])
        if before is None:
            break
        start -= len(before[0])
    behind = BEHIND_A_NUMBER.match(text, number.end())
    return text[start : behind.end() if behind else number.end()].strip()


def _sentence(text: str) -> tuple[str, bool]:
    """The first sentence of a payload, cleaned, and whether it is a question."""
    text = text.lstrip()
    end = SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    return _clean(sentence), bool(end and end[0][0] in "?？") or sentence.rstrip(" *_").endswith(("?", "？"))


def _clean(text: str) -> str:
    """Without the marks around it that are no part of an answer: emphasis, quotes, a full stop."""
    text = text.strip().removeprefix('\\"').removesuffix("\\").strip().strip("*_\"'`“” \t\n")
    text = text.removesuffix('\\"').removesuffix("\\").rstrip()
    return text[:-1].rstrip("*_ ") if text.endswith((".", "。", "．", "｡")) and not text.endswith("..") else text
