"""Select training rows from verified traces, again and otherwise, without verifying again.

    trl-distill select --verified runs/x/verify --strategy shortest --target_format boxed --output_dir runs/x/select

Reads the `verdicts.jsonl` that `verify` wrote; writes `train.jsonl`. Only right, whole and well-formed traces are taken; each row
keeps its problem's pass rate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.stage import StageArguments, is_main_process, parse_stage, stage_main

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trl import TrlParser

    from trl_reasoning_distill.teacher.selection import VerifiedTrace


@dataclass
class SelectionArguments:
    """Which of a problem's traces become training rows, and how they are written."""

    strategy: str = field(
        default="first", metadata={"help": "first, shortest, median, diverse, consensus (majority vote) or all."}
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
    min_agreement: float = field(
        default=0.5, metadata={"help": "For consensus without a gold answer: the majority's least share."}
    )

    def __post_init__(self) -> None:
        from trl_reasoning_distill.data.formatting import ReasoningFormat
        from trl_reasoning_distill.teacher.selection import SelectionConfig

        for name in (self.response_format, self.target_format):
            if name is not None:
                ReasoningFormat.preset(name)
        SelectionConfig(
            self.strategy, self.per_problem, max_pass_rate=self.max_pass_rate, min_agreement=self.min_agreement
        )


@dataclass
class SelectArguments(StageArguments):
    """What is selected from."""

    verified: str = field(default="", metadata={"help": "Folder that the verify stage wrote. Required."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.verified:
            raise ValueError("verified is missing: give the folder that the verify stage wrote, with --verified.")


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((SelectArguments, SelectionArguments), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, selection = parse_stage(make_parser(), args)
    if not is_main_process():
        return

    from trl_reasoning_distill.data.files import read_jsonl
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.teacher.selection import VerifiedTrace

    path = Path(options.verified) / "verdicts.jsonl"
    format_name = selection.response_format or read_format_name(path.parent)
    traces = [
        VerifiedTrace.from_row(row, f"{path}, row {index}") for index, row in enumerate(read_jsonl(path), start=1)
    ]
    if options.dry_run:
        print(f"select: would select from {len(traces)} verified traces in {path}")
        return
    settings = dataclasses.asdict(options) | dataclasses.asdict(selection) | {"response_format": format_name}
    with StageRun("select", options.output_dir, settings, {"verified": path}, overwrite=options.overwrite) as run:
        if run.is_finished:
            print(f"select: nothing to do, {options.output_dir} holds this run's result")
            return
        counts = write_selection(traces, selection, format_name, run.output_dir)
        result = describe_selection(counts)
        run.finish(counts, result)
        print(f"select: {result}")


def write_selection(
    traces: Iterable[VerifiedTrace], selection: SelectionArguments, format_name: str, output_dir: Path
) -> dict[str, int]:
    """Select and write `train.jsonl`.

    Returns:
        The counts of the selection, and `rows`.

    Raises:
        ValueError: If nothing is left to train on, with what became of the traces.
    """
    from trl_reasoning_distill.data.files import write_jsonl
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.teacher.selection import SelectionConfig, select_traces

    prompt = {} if selection.system_prompt is None else {"system_prompt": selection.system_prompt or None}
    config = SelectionConfig(
        strategy=selection.strategy,
        per_problem=selection.per_problem,
        source_format=ReasoningFormat.preset(format_name, **prompt),
        target_format=ReasoningFormat.preset(selection.target_format, **prompt) if selection.target_format else None,
        max_pass_rate=selection.max_pass_rate,
        min_agreement=selection.min_agreement,
    )
    selected = select_traces(traces, config)
    if not selected.rows:
        raise ValueError(
            f"No trace is fit to train on: {selected.counts}. If most are malformed, the traces are in another format than "
            f"{format_name!r} (set response_format); if most are cut, raise the teacher's max_new_tokens."
        )
    write_jsonl(output_dir / "train.jsonl", selected.rows)
    return {**selected.counts, "rows": len(selected.rows)}


def describe_selection(counts: Mapping[str, int]) -> str:
    """What was kept and what was left out, in one line."""
    reasons = {
        "cut": "cut",
        "malformed": "malformed",
        "too_easy": "of too easy problems",
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


if __name__ == "__main__":
    main()
