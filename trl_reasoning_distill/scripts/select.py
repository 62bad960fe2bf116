"""Select training rows from verified traces, again and otherwise, without verifying again.

    trl-distill select --verified runs/x/verify --strategy shortest --target_format boxed --output_dir runs/x/select

Reads the `verdicts.jsonl` that `verify` wrote; writes `train.jsonl`. Only right, whole and well-formed traces are taken; each row
keeps its problem's pass rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.arguments import (
    SelectionArguments,
    describe_selection,
    make_selection,
    read_format_name,
    write_selection,
)
from trl_reasoning_distill.scripts.stage import (
    StageArguments,
    is_main_process,
    open_run,
    parse_stage,
    settings_of,
    stage_main,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl import TrlParser

    from trl_reasoning_distill.data.schema import VerifiedTrace


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

    from trl_reasoning_distill.teacher.selection import read_verified_traces

    path = Path(options.verified) / "verdicts.jsonl"
    format_name = selection.response_format or read_format_name(path.parent)
    traces = read_verified_traces(path)
    if options.dry_run:
        _print_plan(traces, path, selection, format_name)
        return
    settings = settings_of(options, selection) | {"response_format": format_name}
    with open_run("select", options, settings, {"verified": path}) as run:
        if run is None:
            return
        counts = write_selection(traces, selection, format_name, run.output_dir)
        result = describe_selection(counts)
        run.finish(counts, result)
        print(f"select: {result}")


def _print_plan(traces: Sequence[VerifiedTrace], path: Path, selection: SelectionArguments, format_name: str) -> None:
    """What a real run would keep, and two of the traces that it decides on, of different verdicts if there are."""
    from trl_reasoning_distill.data.examples import describe_trace

    counts = make_selection(traces, selection, format_name)[1]
    print(f"select: of {len(traces):,} verified traces in {path} would be {describe_selection(counts)}")
    verdicts = list({trace.status: trace for trace in reversed(traces)}.values())[::-1]
    for trace in verdicts[:2] if len(verdicts) > 1 else traces[:2]:
        print(describe_trace(trace, trace))


if __name__ == "__main__":
    main()
