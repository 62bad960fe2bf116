"""What `verify` and `select` share: the options of the selection, and the writing of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_reasoning_distill.teacher.selection import SelectionConfig, VerifiedTrace


@dataclass
class SelectionArguments:
    """Which of a problem's traces become training rows, and how they are written."""

    strategy: str = field(
        default="first",
        metadata={
            "help": "first, shortest, median, agreed, diverse, consensus (majority vote without a gold answer) or all."
        },
    )
    per_problem: int = field(default=1, metadata={"help": "At most this many traces per problem."})
    response_format: str | None = field(
        default=None, metadata={"help": "The format the traces are in; default: what the stage before says."}
    )
    target_format: str | None = field(
        default=None, metadata={"help": "Write the training rows in this format instead: think, gsm8k, boxed, …"}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt of the training rows; default: the format's own, none if empty."},
    )
    max_pass_rate: float = field(
        default=1.0, metadata={"help": "Leave out problems of which a larger share of the traces is right."}
    )
    easy_share: float = field(
        default=1.0,
        metadata={
            "help": "Thin out easy problems: the share to keep of those that are always solved, fewer of the often solved."
        },
    )
    min_agreement: float = field(
        default=0.5, metadata={"help": "For consensus without a gold answer: the majority's least share."}
    )

    def __post_init__(self) -> None:
        from trl_reasoning_distill.data.formatting import ReasoningFormat

        for name in (self.response_format, self.target_format):
            if name is not None:
                ReasoningFormat.preset(name)
        self.make_config("think")

    def make_config(self, format_name: str) -> SelectionConfig:
        """What to select, from traces in the format `format_name`.

        Raises:
            ValueError: If an option is out of its range.
        """
        from trl_reasoning_distill.data.formatting import ReasoningFormat
        from trl_reasoning_distill.teacher.selection import SelectionConfig

        prompt = {} if self.system_prompt is None else {"system_prompt": self.system_prompt or None}
        return SelectionConfig(
            strategy=self.strategy,
            per_problem=self.per_problem,
            source_format=ReasoningFormat.preset(format_name, **prompt),
            target_format=ReasoningFormat.preset(self.target_format, **prompt) if self.target_format else None,
            max_pass_rate=self.max_pass_rate,
            min_agreement=self.min_agreement,
            easy_share=self.easy_share,
        )


def make_selection(
    traces: Iterable[VerifiedTrace], selection: SelectionArguments, format_name: str
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Select.

    Returns:
        The rows of `train.jsonl`; the counts of the selection, and `rows`.

    Raises:
        ValueError: If nothing is left to train on, with what became of the traces.
    """
    from trl_reasoning_distill.teacher.selection import select_traces

    selected = select_traces(traces, selection.make_config(format_name))
    if not selected.rows:
        raise ValueError(
            f"No trace is fit to train on: {selected.counts}. If most are malformed, the traces are in another format than "
            f"{format_name!r} (set response_format); if most are cut, raise the teacher's max_new_tokens."
        )
    return selected.rows, {**selected.counts, "rows": len(selected.rows)}


def write_selection(
    traces: Iterable[VerifiedTrace], selection: SelectionArguments, format_name: str, output_dir: Path
) -> dict[str, int]:
    """Select, write `train.jsonl`, and return the counts; see `make_selection`."""
    from trl_reasoning_distill.data.files import write_jsonl

    rows, counts = make_selection(traces, selection, format_name)
    write_jsonl(output_dir / "train.jsonl", rows)
    return counts


def describe_selection(counts: Mapping[str, int]) -> str:
    """What was kept and what was left out, in one line."""
    reasons = {
        "cut": "cut",
        "malformed": "malformed",
        "too_easy": "of too easy problems",
        "thinned_out": "of easy problems",
        "not_rendered": "not to be rendered",
    }
    left_out = ", ".join(f"{counts[key]} {text}" for key, text in reasons.items() if counts[key])
    kept = f"{counts['problems_kept']} problems kept of {counts['problems']}"
    rows = f" ({counts['rows']} rows)" if counts["rows"] != counts["problems_kept"] else ""
    return f"{kept}{rows}" + (f"; left out: {left_out}" if left_out else "")


def read_format_name(folder: Path) -> str:
    """The response format that the manifest of an earlier stage names; `think` if there is none."""
    from trl_reasoning_distill.data.manifest import read_manifest

    try:
        name = read_manifest(folder).config.get("response_format")
    except FileNotFoundError:
        name = None
    return name or "think"
