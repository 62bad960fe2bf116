"""What is in a set of problems or training rows: counts, lengths, samples; as a table, and as a chart in text or in a picture."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_reasoning_distill.data.chat import render_chat
from trl_reasoning_distill.data.examples import describe_messages
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.terminal import printable, shown, table

_BLOCKS = " ▏▎▍▌▋▊▉█"
_CHART_WIDTH = 50
_BATCH = 512

Length = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Item:
    """A problem or training row, as the model would see it.

    Attributes:
        source: What it is counted under.
        kind: `Problem.kind`.
        prompt: The question, or the prompt with its system message.
        reply: The solution and answer, or the completion; `None` without one.
        answer: The gold answer.
        messages: The whole conversation, for a tokenizer with a chat template.
    """

    source: str
    kind: str
    prompt: str
    reply: str | None
    answer: str | None
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Preview:
    """Items and the lengths of those that were measured.

    Attributes:
        items: All items.
        measured: Indices of the measured ones.
        prompt_lengths: Lengths of their prompts.
        lengths: Lengths of prompt and reply.
        unit: `"tokens"` or `"characters"`.
        max_length: What must be fitted into, in `unit`; `None` for nothing.
    """

    items: list[Item]
    measured: list[int]
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    unit: str
    max_length: int | None

    def to_text(self, samples: int = 1) -> str:
        """Table, chart, and the first `samples` items of each source."""
        return "\n\n".join(part for part in (self.table(), self.chart(), self.samples(samples)) if part)

    def table(self) -> str:
        """A line per source, and one for all if there are several."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            groups[item.source].append(index)
        header = [
            "source",
            "rows",
            "kinds",
            "answers",
            "replies",
            f"prompt {self.unit}",
            f"in all {self.unit}",
            "longest",
        ]
        rows = [header if self.max_length is None else [*header, f"fit {self.max_length:,}"]]
        rows += [self._line(name, group) for name, group in groups.items()]
        if len(groups) > 1:
            rows.append(self._line("all", range(len(self.items))))
        lines = shown(table(rows[0], rows[1:]))
        note = "lengths: median and 95th percentile"
        if len(self.measured) < len(self.items):
            note += f", of {len(self.measured):,} rows drawn at random"
        return f"{lines}\n({note})"

    def _line(self, name: str, group: Iterable[int]) -> list[str]:
        members = set(group)
        items = [self.items[index] for index in members]
        chosen = np.array([index in members for index in self.measured], dtype=bool)
        lengths = self.lengths[chosen]
        line = [
            name,
            f"{len(items):,}",
            str(len({item.kind for item in items})),
            f"{sum(item.answer is not None for item in items):,}",
            f"{sum(item.reply is not None for item in items):,}",
            _spread(self.prompt_lengths[chosen]),
            _spread(lengths),
            f"{lengths.max():,}" if len(lengths) else "–",
        ]
        if self.max_length is not None:
            line.append(f"{(lengths <= self.max_length).mean():.1%}" if len(lengths) else "–")
        return line

    def chart(self, bins: int = 12) -> str:
        """A histogram of the lengths, in characters."""
        if not len(self.lengths):
            return ""
        counts, edges = self._bins(bins)
        width = len(f"{edges[-1]:,.0f}")
        lines = [f"{self.unit} in all"]
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            mark = ""
            if self.max_length is not None and low <= self.max_length < high:
                mark = f"  ← {self.max_length:,}"
            share = count / max(1, counts.max()) * _CHART_WIDTH
            bar = _BLOCKS[-1] * int(share) + _BLOCKS[int(share % 1 * (len(_BLOCKS) - 1))].strip()
            lines.append(f"{low:>{width},.0f} – {high:>{width},.0f} │{bar} {count:,}{mark}")
        return "\n".join(lines)

    def samples(self, count: int) -> str:
        """The first items of each source, shortened."""
        printed: dict[str, int] = defaultdict(int)
        parts = []
        for item in self.items:
            if printed[item.source] < count:
                printed[item.source] += 1
                parts.append(f"── {printable(item.source)} ──\n{describe_messages(item.messages)}")
                if item.reply is None:
                    parts.append(f"answer: {printable(str(item.answer))}")
        return "\n".join(parts)

    def plot(self, path: str | Path) -> None:
        """Write the histogram as a picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        counts, edges = self._bins(40)
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#3b6ea5")
        if self.max_length is not None:
            fit = (self.lengths <= self.max_length).mean()
            axes.axvline(self.max_length, color="#c0392b", linewidth=1)
            axes.set_title(f"{fit:.1%} fit into {self.max_length:,} {self.unit}", fontsize=10)
        axes.set_xlabel(f"{self.unit}, prompt and reply")
        axes.set_ylabel("rows")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)

    def _bins(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges; the last bin reaches to the longest, so that a few long ones do not flatten the others."""
        top = float(np.percentile(self.lengths, 99)) if len(self.lengths) > 100 else float(self.lengths.max())
        edges = np.linspace(float(self.lengths.min()), max(top, float(self.lengths.min()) + 1), bins + 1)
        edges[-1] = max(edges[-1], float(self.lengths.max())) + 1
        return np.histogram(self.lengths, bins=edges)


def make_preview(
    items: Sequence[Item],
    tokenizer: Any = None,
    max_length: int | None = None,
    *,
    max_measured: int = 20_000,
    seed: int = 0,
) -> Preview:
    """Measure items.

    Args:
        items: What is previewed.
        tokenizer: A `transformers` tokenizer, whose chat template is used if it has one; `None` counts characters.
        max_length: What must be fitted into, in the tokenizer's tokens.
        max_measured: Measure at most this many, drawn at random.
        seed: Of that draw.
    """
    measured = list(range(len(items)))
    if len(measured) > max_measured:
        measured = sorted(random.Random(seed).sample(measured, max_measured))
    chosen = [items[index] for index in measured]
    length: Length = (lambda texts: [len(text) for text in texts]) if tokenizer is None else _token_counter(tokenizer)
    templated = tokenizer is not None and getattr(tokenizer, "chat_template", None)

    def whole(item: Item) -> str:
        if templated:
            return render_chat(tokenizer, item.messages)
        return "\n".join(message["content"] for message in item.messages)

    return Preview(
        list(items),
        measured,
        np.array(_in_batches(length, [item.prompt for item in chosen]), dtype=np.int64),
        np.array(_in_batches(length, [whole(item) for item in chosen]), dtype=np.int64),
        "characters" if tokenizer is None else "tokens",
        None if tokenizer is None else max_length,
    )


def problem_item(problem: Problem) -> Item:
    """An `Item` of a problem; its reply is its solution and what follows it."""
    reply = None
    if problem.solution is not None:
        reply = "\n".join(part for part in (problem.solution, problem.response or problem.answer) if part)
    messages = [{"role": "user", "content": problem.question}]
    messages += [{"role": "assistant", "content": reply}] if reply else []
    return Item(problem.source, problem.kind, problem.question, reply, problem.answer, tuple(messages))


def row_item(row: Mapping[str, Any]) -> Item:
    """An `Item` of a training row with `prompt` and `completion`, or of plain text, which is all reply.

    Raises:
        ValueError: If it has neither as messages nor as text.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("text"), str):
        prompt, completion = "", row["text"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(f"A training row needs `prompt` and `completion`, found {json.dumps(sorted(row))}.")
    return Item(
        str(row.get("source", "rows")),
        str(row.get("kind", "")),
        "\n".join(message["content"] for message in prompt),
        "\n".join(message["content"] for message in completion),
        row.get("answer"),
        (*prompt, *completion),
    )


def _token_counter(tokenizer: Any) -> Length:
    return lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _in_batches(length: Length, texts: Sequence[str]) -> list[int]:
    return [count for start in range(0, len(texts), _BATCH) for count in length(texts[start : start + _BATCH])]


def _spread(lengths: np.ndarray) -> str:
    return f"{np.median(lengths):,.0f}, {np.percentile(lengths, 95):,.0f}" if len(lengths) else "–"
