"""Where a completion ends: before a stop string, or before the question that a model asks itself once it has answered.

A base model does not know that its turn is over. Behind `#### 5` it writes the next question of its few-shot prompt, and that question's
answer, which would then be judged in place of the first. So a completion ends

- at the text of an end-of-turn token, such as `<|im_end|>`, which a model writes whose vocabulary has no such token;
- at a line such as `Question:`, `Q:` or `Problem 2:`, if the text before it has an answer;
- behind a line that marks the answer (`#### 5`, or as the format has it), if another question and answer follow, or a cut.

Inside a thought nothing ends but at an end-of-turn token, and a model that reconsiders (`Wait, …`) is not interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.teacher.sampling.base import GenerationOutput
from trl_reasoning_distill.verification.extract import extract_answer

_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|eom_id|start_header_id|user|return)\|>"
    r"|<(?:end_of_turn|start_of_turn)>|<｜(?:end▁of▁sentence|User)｜>|</s>"
)
_NEW_QUESTION = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]*|\*\*)?(?:question|problem|exercise|example|instruction|user|human|q)\b[ \t]*(?:\d{1,4}|#\d{1,4})?(?:\*\*)?[ \t]*[:.]",
    re.IGNORECASE | re.MULTILINE,
)
_SECOND_THOUGHT = re.compile(
    r"\W*(?:wait|hold on|hmm|actually|but|no\b|let me|let's|let us|check|to check|verif|double.check|correction|oops|sorry|i made|so\b|therefore|thus)",
    re.IGNORECASE,
)
_MARKED = (
    "hash",
    "boxed",
    "final_answer",
    "answer_is",
)  # rules of `extract_answer` for which the text itself names its answer
_MOST_LOOKED_AT = 32  # an answer is looked for before each, and a text may hold a hundred thousand
_BOXED = "\\boxed{"


def end_completion(
    output: GenerationOutput, response_format: ReasoningFormat | None, stop: Sequence[str] | None
) -> GenerationOutput:
    """The output with its text up to where it ends; one that was cut only behind that end is whole.

    Args:
        output: What an engine wrote. The tokens it took stay counted.
        response_format: How it was to write; `None` if that was left open.
        stop: The text ends before the first of these strings, and nowhere else; `None`: by the rules above.
    """
    text = output.text
    if stop is None:
        end = _end_of_answer(text, response_format, is_cut=output.finish_reason == "length")
    else:
        end = min((at for at in map(text.find, stop) if at >= 0), default=None)
    if end is None:
        return output
    return dataclasses.replace(output, text=text[:end].rstrip(), finish_reason="stop")


def _end_of_answer(text: str, response_format: ReasoningFormat | None, is_cut: bool) -> int | None:
    """Where the answer to the question that was asked ends, if the text goes on behind it."""
    token = next((match for match in _END_OF_TURN.finditer(text) if text[: match.start()].strip()), None)
    turn = text[: token.start()] if token else text
    labels = (match.start() for match in itertools.islice(_NEW_QUESTION.finditer(turn), _MOST_LOOKED_AT))
    found = (
        token.start() if token else None,
        next((start for start in labels if _is_answered(turn, start)), None),
        _end_of_marked_answer(turn, response_format, is_cut and token is None),
    )
    return min((end for end in found if end is not None), default=None)


def _is_answered(text: str, end: int) -> bool:
    """Whether the text up to `end` has an answer: one that it names, or a new paragraph begins and it has any."""
    before = text[:end]
    if not before.strip():
        return False
    found = extract_answer(before)
    if found.answer is None or found.rule in _MARKED:
        return found.answer is not None
    return before.endswith("\n\n") or (found.rule == "whole" and any(map(str.isdigit, found.answer)))


def _end_of_marked_answer(text: str, response_format: ReasoningFormat | None, is_cut: bool) -> int | None:
    """The end of the first line that marks an answer, if what follows answers something else."""
    for match in itertools.islice(_answer_lines(response_format).finditer(text), _MOST_LOOKED_AT):
        rest = text[match.end() :]
        if not rest.strip() or extract_answer(text[: match.end()]).rule not in _MARKED:
            continue
        if _SECOND_THOUGHT.match(rest):
            return None
        return match.end() if is_cut or _answer_lines(response_format).search(rest) else None
    return None


def _answer_lines(response_format: ReasoningFormat | None) -> re.Pattern[str]:
    """Lines that hold an answer and nothing else: GSM8K's, which models write unasked, and those of the format."""
    marker = response_format.answer_prefix.strip() if response_format else ""
    lines = [r"####(?!#)[ \t]*[^\s#][^\n]*"]
    if marker == _BOXED:
        lines.append(r"[$\\(\[* ]{0,4}\\boxed\{[^\n]*\}[$\\)\]*. ]{0,4}")
    elif marker and marker != "####":
        lines.append(rf"{re.escape(marker)}[ \t]*[^\s][^\n]*")
    return re.compile(rf"^[ \t]*(?:{'|'.join(lines)})$", re.IGNORECASE | re.MULTILINE)
