"""Examples as a person sees them: rows with what is supervised, prompts as a model reads them, traces with their verdicts.

In a terminal by colour; elsewhere, or with `NO_COLOR`, by marks: `⟦supervised⟧`, `user⟦what a message says⟧`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.chat import encode_prompt
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import completion_start, is_supervised
from trl_reasoning_distill.terminal import BOLD, CYAN, DIM, GREEN, MAGENTA, RED, YELLOW, paint, printable, takes_colour

MARKS = ("⟦", "⟧")
_ROLES = {"system": MAGENTA, "user": CYAN, "assistant": GREEN}
_VERDICTS = {"correct": GREEN, "incorrect": RED, "undecided": YELLOW}
_SHOWN = 600

Piece = tuple[str, str]
"""A text and its style."""


def describe_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    form: ReasoningFormat | None = None,
    *,
    colour: bool | None = None,
) -> str:
    """Every row as text, with its supervised tokens marked, and the reasoning and the answer that the format reads in them.

    Args:
        rows: With `input_ids` and `labels`.
        tokenizer: Decodes them; special tokens stay visible.
        form: Reads the supervised text; `None` leaves that line out.
        colour: Whether to mark by colour; `None` looks at the terminal.
    """
    colour = takes_colour() if colour is None else colour
    return "\n".join(_describe_row(number, row, tokenizer, form, colour) for number, row in enumerate(rows, start=1))


def describe_prompts(
    conversations: Iterable[Sequence[Mapping[str, str]]],
    tokenizer: Any = None,
    *,
    colour: bool | None = None,
    **options: Any,
) -> str:
    """Every conversation as the model reads it, up to where it begins to write, with each message's role marked.

    Args:
        conversations: Messages with `role` and `content`.
        tokenizer: Of the model; `None` where its server applies the chat template: then the messages alone are shown.
        colour: As `describe_examples`.
        options: For the chat template.
    """
    colour = takes_colour() if colour is None else colour
    shown = []
    for number, messages in enumerate(conversations, start=1):
        if tokenizer is None:
            size, text = f"{len(messages)} messages", "".join(f"{message['content']}\n" for message in messages)
        else:
            ids = encode_prompt(tokenizer, messages, **options)
            size, text = f"{len(ids):,} tokens", tokenizer.decode(ids)
        body = "".join(_mark(piece, role, colour) for piece, role in _by_role(text, messages))
        shown.append(f"{paint(f'--- prompt {number}: {size}', BOLD, colour)}\n{body}")
    return "\n".join(shown)


def describe_messages(messages: Iterable[Mapping[str, str]], *, colour: bool | None = None) -> str:
    """Every message with its role marked; long ones shortened."""
    colour = takes_colour() if colour is None else colour
    return "\n".join(_mark(_shorten(message["content"]), message["role"], colour) for message in messages)


def describe_trace(trace: Any, verdict: Any, *, colour: bool | None = None) -> str:
    """A question, what a model wrote for it, the gold answer, and the verdict with its reason.

    Args:
        trace: A `Trace`.
        verdict: A `Verdict`, or a trace that carries one.
        colour: As `describe_examples`.
    """
    colour = takes_colour() if colour is None else colour
    head = paint(f"--- trace {printable(trace.problem_id)} #{trace.sample}: {trace.num_tokens:,} tokens", BOLD, colour)
    said = f"{verdict.status} ({verdict.method}: {printable(verdict.reason)})"
    return "\n".join(
        [
            head + (", cut at the limit" if trace.finish_reason == "length" else ""),
            _mark(_shorten(trace.question), "user", colour),
            _mark(_shorten(trace.completion), "assistant", colour),
            f"--- gold: {'none' if trace.gold_answer is None else printable(trace.gold_answer)}; verdict: "
            f"{paint(said, _VERDICTS[verdict.status], colour)}",
        ]
    )


def _describe_row(
    number: int, row: Mapping[str, Any], tokenizer: Any, form: ReasoningFormat | None, colour: bool
) -> str:
    labels = list(row["labels"])
    added = {token for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    special = added | set(tokenizer.all_special_ids)
    text = []
    for is_learnt, group in itertools.groupby(
        zip(row["input_ids"], labels, strict=True), key=lambda pair: is_supervised(pair[1])
    ):
        runs = itertools.groupby((token for token, _ in group), key=special.__contains__)
        style = GREEN if is_learnt else DIM
        pieces = [
            (printable(tokenizer.decode(list(ids))), f"{style};{BOLD}" if is_special else style)
            for is_special, ids in runs
        ]
        whole = "".join(paint(piece, style, colour) for piece, style in _shorten_pieces(pieces))
        text.append(whole.join(MARKS) if is_learnt and not colour else whole)
    supervised = sum(map(is_supervised, labels))
    mark = paint("in this colour", GREEN, True) if colour else "…".join(MARKS)
    lines = [f"--- example {number}: {len(labels):,} tokens, {supervised:,} supervised {mark}", "".join(text)]
    return "\n".join([*lines, _read_back(row, tokenizer, form)] if form is not None else lines)


def _read_back(row: Mapping[str, Any], tokenizer: Any, form: ReasoningFormat) -> str:
    ids, labels = list(row["input_ids"]), row["labels"]
    start = completion_start(labels)
    opened = form.is_opened_by(tokenizer.decode(ids[:start]))
    parsed = form.parse(tokenizer.decode(ids[start:], skip_special_tokens=True), opened=opened)
    reasoning = "no reasoning" if not parsed.reasoning else f"a reasoning of {len(parsed.reasoning.split()):,} words"
    answer = "no answer" if parsed.answer is None else f"the answer {_shorten(parsed.answer.strip(), 80)!r}"
    verdict = "well formed" if parsed.well_formed else "not well formed"
    return f"--- reads back as {reasoning} and {answer}; {verdict} ({form.name})"


def _by_role(text: str, messages: Iterable[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """A rendered conversation in pieces, each with the role of the message that it repeats; without one, what the template adds."""
    position = 0
    for message in messages:
        content = message["content"].strip()  # templates strip it too
        start = text.find(content, position)
        if content and start >= 0:
            yield text[position:start], ""
            yield content, message["role"]
            position = start + len(content)
    yield text[position:], ""


def _mark(text: str, role: str, colour: bool) -> str:
    text = printable(text)
    if colour:
        return paint(text, _ROLES.get(role, DIM), colour)
    return f"{role}{text.join(MARKS)}" if role else text


def _shorten_pieces(pieces: Sequence[Piece], limit: int = _SHOWN) -> Iterator[Piece]:
    """The two ends of pieces that are too long to show together."""
    total = sum(len(text) for text, _ in pieces)
    if total <= limit:
        yield from pieces
        return
    position, half, is_cut = 0, limit // 2, False
    for text, style in pieces:
        head, tail = text[: max(0, half - position)], text[max(0, total - half - position) :]
        position += len(text)
        if len(head) == len(text) or len(tail) == len(text):
            yield text, style
            continue
        yield head, style
        if not is_cut:
            yield f" […{total - limit:,} characters…] ", DIM
            is_cut = True
        yield tail, style


def _shorten(text: str, limit: int = _SHOWN) -> str:
    """The two ends of a text that is too long to show."""
    return "".join(piece for piece, _ in _shorten_pieces([(text, "")], limit))
