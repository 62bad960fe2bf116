"""One `ReasoningFormat` says how a reasoning and an answer become text, and how they are read back.

    text = [open_tag ⏎] reasoning [⏎ close_tag] gap answer_prefix answer answer_suffix

`render` writes this and checks that `parse` reads the same two strings back, so whatever `render` returns round-trips exactly;
a reasoning or answer that holds the format's own tags, or an answer that holds its marker, is refused. `parse` also reads what models really write,
and says in `well_formed` whether the text kept to the format:

| text (preset `think`) | reasoning | answer | well formed |
|---|---|---|---|
| `<think>r</think>a` | r | a | yes; white space around is free |
| `r</think>a`, and the prompt ended with `<think>` (`opened=True`) | r | a | yes |
| `r</think>a` | r | a | no |
| `<think>r` | r | none | no: a thought that never ended commits to nothing |
| `a` | none | a | no |
| `Hello <think>r</think>a` | r | a | no |
| `<think>r1</think>r2</think>a`, nested tags | from the first open tag to the last close tag | after the last close tag | no |
| `<think>r1</think>a<think>r2` | all after the first open tag | none | no: it thought again and never came back |

Everything here takes time linear in the text, on any text.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

ANSWER_MARK = "####"
"""What GSM8K writes before an answer."""

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?:\s+(?=[-\w\\])|(?=[\\\d]))(-?\d+(?:[.,/]\d+)*|\\[a-zA-Z]+(?:\{[^{}]*\}|\d)*|[a-zA-Z](?!\w))"
)
_BETWEEN_BOXES = re.compile(r"(?:[\s$.,;:&(){}\\]|and|or|q?quad|text|[a-zA-Z]\s?=){0,40}")
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ParsedResponse:
    """What `ReasoningFormat.parse` read.

    Attributes:
        reasoning: The chain of thought, or `None` if the format has tags for it and the text has none.
        answer: What the text commits to after the reasoning, or `None`.
        well_formed: Whether the text keeps to the format: each tag once, nothing before the open tag, the answer marker (the last
            one counts), and an answer that is not blank. An empty reasoning is well formed.
    """

    reasoning: str | None
    answer: str | None
    well_formed: bool


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """How a model is to write its reasoning and its answer.

    Attributes:
        name: For messages and manifests.
        open_tag: Opens the reasoning; empty when it is plain text. Both tags are given, or neither.
        close_tag: Closes the reasoning.
        gap: White space between the reasoning and the answer.
        answer_prefix: Written before the answer, such as `"#### "`; its last occurrence counts.
        answer_suffix: Written after the answer, such as `"}"`.
        system_prompt: Asks a model that was not trained on the format to keep to it; `None` for no system message.
    """

    name: str
    open_tag: str = ""
    close_tag: str = ""
    gap: str = "\n\n"
    answer_prefix: str = ""
    answer_suffix: str = ""
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if bool(self.open_tag) != bool(self.close_tag) or (self.open_tag and self.open_tag == self.close_tag):
            raise ValueError(
                f"Format {self.name!r} has open_tag={self.open_tag!r} and close_tag={self.close_tag!r}: give two different tags, or neither."
            )
        if self.gap.strip() or not (self.gap or self.close_tag or self.answer_prefix):
            raise ValueError(
                f"Format {self.name!r} has gap={self.gap!r}: give white space, and some where nothing else parts the two."
            )
        if self.answer_prefix[:1].isspace() or (self.answer_prefix and not self._marker):
            raise ValueError(
                f"Format {self.name!r} has answer_prefix={self.answer_prefix!r}: begin it with a mark, and put white space in gap."
            )
        if self.answer_suffix and not self.answer_prefix:
            raise ValueError(
                f"Format {self.name!r} has an answer_suffix ({self.answer_suffix!r}) but no answer_prefix: give both."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReasoningFormat:
        """A format by name: `think`, `gsm8k`, `boxed`, `final_answer` or `plain`.

        Args:
            name: One of `PRESETS`.
            changes: Fields to replace, such as `system_prompt="…"`.

        Raises:
            ValueError: For an unknown name, or changes that contradict each other.
        """
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown reasoning format {name!r}; there are {sorted(PRESETS)}.{hint}")
        return dataclasses.replace(PRESETS[name], **changes)

    def render(self, reasoning: str, answer: str) -> str:
        """The text of a response; `parse` of it gives back exactly `reasoning` and `answer`.

        Raises:
            ValueError: If one of the two holds the format's own markers, so that no reader could tell them apart.
        """
        answer_part = f"{self.answer_prefix}{answer}{self.answer_suffix}"
        if self.open_tag:
            text = f"{self.open_tag}\n{reasoning}\n{self.close_tag}{self.gap}{answer_part}"
        else:
            text = f"{reasoning}{self.gap}{answer_part}" if reasoning else answer_part
        parsed = self.parse(text)
        tagged = self.open_tag and any(
            tag in part for tag in (self.open_tag, self.close_tag) for part in (reasoning, answer)
        )
        if tagged or (parsed.reasoning, parsed.answer) != (reasoning, answer):
            markers = [
                m for m in (self.open_tag, self.close_tag, self.answer_prefix.strip(), self.answer_suffix) if m
            ] or [self.gap]
            raise ValueError(
                f"Format {self.name!r} cannot hold this reasoning and answer, because one of them contains its own markers {markers}: "
                f"reasoning {reasoning!r:.200}, answer {answer!r:.80}. Remove the markers from them first, or use another format."
            )
        return text

    def parse(self, text: str, *, opened: bool = False) -> ParsedResponse:
        """Read a response; never an error, whatever the text.

        Args:
            text: What the model wrote.
            opened: Whether the prompt already ended with the open tag (see `is_opened_by`), so that the text begins inside the reasoning.
        """
        if not self.open_tag:
            return self._split_at_answer(text)
        doubled = opened and text.lstrip().startswith(self.open_tag)
        if opened and not doubled:
            text = f"{self.open_tag}\n{text}"
        first_open, first_close = text.find(self.open_tag), text.find(self.close_tag)
        last_open, last_close = text.rfind(self.open_tag), text.rfind(self.close_tag)
        if first_open < 0 and first_close < 0:
            return ParsedResponse(None, self._committed_answer(text), False)
        opens = first_open >= 0 and (first_close < 0 or first_open < first_close)
        start = first_open + len(self.open_tag) if opens else 0
        if last_close < 0 or last_close < last_open:  # a thought is still open at the end
            return ParsedResponse(text[start:].strip(), None, False)
        inside = text[start:last_close]
        exact = opens and len(inside) >= 2 and inside[0] == inside[-1] == "\n"
        answer = self._committed_answer(text[last_close + len(self.close_tag) :])
        single = first_open == last_open and first_close == last_close
        well_formed = (
            opens and single and not doubled and not text[:first_open].strip() and bool(answer and answer.strip())
        )
        return ParsedResponse(inside[1:-1] if exact else inside.strip(), answer, well_formed)

    def is_opened_by(self, prompt: str) -> bool:
        """Whether a rendered generation prompt ends with the open tag, as DeepSeek-R1's and QwQ's templates do."""
        return bool(self.open_tag) and prompt.rstrip().endswith(self.open_tag)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`: the system prompt, if any, and the user's turn."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": question}]

    def _committed_answer(self, rest: str) -> str | None:
        """The answer in what follows the close tag: exact if written as `render` does, else stripped."""
        if not self._marker:
            return rest[len(self.gap) :] if rest.startswith(self.gap) else rest.strip() or None
        found = self._find_marked(rest)
        if found is None:
            return None
        start, answer = found
        exact = rest.startswith(self.gap + self.answer_prefix) and start == len(self.gap)
        return answer[len(self.answer_prefix) - len(self._marker) :] if exact else answer.strip() or None

    def _split_at_answer(self, text: str) -> ParsedResponse:
        """Parse for formats without tags: what stands before the last answer marker is the reasoning."""
        if not self._marker:  # the answer is the last paragraph
            reasoning, _, answer = text.rpartition(self.gap)
            return ParsedResponse(reasoning, answer, bool(answer.strip()))
        found = self._find_marked(text)
        if found is None:
            return ParsedResponse(text.strip(), None, False)
        start, answer = found
        reasoning = text[:start]
        if text.startswith(self.answer_prefix, start) and (not reasoning or reasoning.endswith(self.gap)):
            reasoning = reasoning[: max(0, start - len(self.gap))]
            answer = answer[len(self.answer_prefix) - len(self._marker) :]
            return ParsedResponse(reasoning, answer, bool(answer.strip()))
        return ParsedResponse(reasoning.strip(), answer.strip() or None, bool(answer.strip()))

    @property
    def _marker(self) -> str:
        return self.answer_prefix.strip()

    def _find_marked(self, text: str) -> tuple[int, str] | None:
        """Where the last answer marker starts and what follows it, up to the suffix; `None` if there is none."""
        if self._marker == "\\boxed{":
            box = last_boxed(text)
            return (box[0], text[box[1] : box[2]]) if box else None
        position = -1
        for match in re.finditer(re.escape(self._marker), text, re.IGNORECASE | re.ASCII):
            position = match.start()
        start = position + len(self._marker)
        end = text.rfind(self.answer_suffix, start) if self.answer_suffix else len(text)
        return None if position < 0 or end < 0 else (position, text[start:end])


def iter_boxed(text: str) -> Iterator[tuple[int, int, int]]:
    r"""Each closed `\boxed{…}` or `\fbox{…}`: where it starts, where its content starts and ends; in the order in which they close.

    A nested box closes before the one around it, so the last one yielded is the last outermost box. Escaped braces do not
    count, and a box that never closes is passed over. One pass, whatever the nesting.
    """
    stack: list[tuple[int, int] | None] = []
    for match in _BOX_TOKENS.finditer(text):
        token = match.group()
        if token == "}":
            if stack and (opened := stack.pop()) is not None:
                yield (*opened, match.start())
        elif token == "{":
            stack.append(None)
        elif token.endswith("{") and len(token) > 2:
            stack.append((match.start(), match.end()))


def last_boxed(text: str) -> tuple[int, int, int] | None:
    r"""The last outermost `\boxed{…}` of the text, as `iter_boxed` gives it, or `None`."""
    last = deque(iter_boxed(text), maxlen=1)
    return last[0] if last else None


def answer_boxed(text: str, *, strict: bool = False) -> str | None:
    r"""The answer that a solution boxes; several boxes in a row (`$\boxed{1}$ and $\boxed{2}$`) are one answer of several values, `1, 2`.

    Read are `\boxed{…}` and `\fbox{…}`, and TeX's form without braces: `\boxed 2`, `\boxed\frac12`.

    Args:
        text: The solution.
        strict: Refuse a solution that boxes other things elsewhere; otherwise the last boxes count.

    Raises:
        ValueError: If `strict` and it cannot be known which of the boxes is the answer.
    """
    boxes = _outermost_boxes(text)
    if not boxes:
        return None
    values = [text[start:end].strip() for _, start, end, _ in boxes]
    first, answers = len(boxes) - 1, [values[-1]]
    while first and (between := _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][3], boxes[first][0])):
        first -= 1
        if "or" not in between.group():  # "or" leads to the same answer in another form
            answers.insert(0, values[first])
    answers = [value for value in dict.fromkeys(answers) if value]
    others = [value for value in dict.fromkeys(values[:first]) if value and value not in answers]
    if strict and others:
        raise ValueError(f"the solution boxes several answers: {'; '.join([*others, *answers])}")
    return ", ".join(answers) or None


def _outermost_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Where each outermost box starts, where its content starts and ends, and where the box ends; in order."""
    found: list[tuple[int, int, int, int]] = []
    for start, content, end in iter_boxed(text):
        while found and found[-1][0] > start:  # stood inside this one
            found.pop()
        found.append((start, content, end, end + 1))
    found.extend((match.start(), *match.span(1), match.end()) for match in _BARE_BOX.finditer(text))
    found.sort()
    return [box for before, box in zip([(0, 0, 0, 0), *found], found, strict=False) if box[0] >= before[3]]


def split_marked_answer(text: str) -> tuple[str, str]:
    """A solution in GSM8K's form as its steps and the answer after its last `####`, without thousands separators or calculator marks.

    Raises:
        ValueError: If nothing is marked: the whole text is never taken for the answer.
    """
    solution, mark, answer = text.rpartition(ANSWER_MARK)
    answer = answer.strip().replace(",", "")
    if not (mark and answer):
        raise ValueError(f"the answer has no {ANSWER_MARK} line")
    return remove_calculator_marks(solution).strip(), answer


def remove_calculator_marks(text: str) -> str:
    """GSM8K's text without its calculator marks: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return _CALCULATOR_MARK.sub("", text)


PRESETS: Mapping[str, ReasoningFormat] = {
    "think": ReasoningFormat("think", open_tag="<think>", close_tag="</think>"),
    "gsm8k": ReasoningFormat(
        "gsm8k",
        gap="\n",
        answer_prefix=f"{ANSWER_MARK} ",
        system_prompt="Solve the problem step by step. Then write a last line with #### and the final answer, a number without its unit.",
    ),
    "boxed": ReasoningFormat(
        "boxed",
        answer_prefix="\\boxed{",
        answer_suffix="}",
        system_prompt="Solve the problem step by step, and put your final answer within \\boxed{}.",
    ),
    "final_answer": ReasoningFormat(
        "final_answer",
        answer_prefix="Final Answer: ",
        system_prompt='Solve the problem step by step. Then write a last line that begins with "Final Answer:", followed by the answer alone.',
    ),
    "plain": ReasoningFormat("plain"),
}
