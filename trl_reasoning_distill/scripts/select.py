"""Select training rows from verified traces, again and otherwise, without verifying again.

    trl-distill select --verified runs/x/verify --strategy shortest --target_format boxed --output_dir runs/x/select

Reads the `verdicts.jsonl` that `verify` wrote; writes `train.jsonl`. Only right, whole and well-formed traces are taken; each row
keeps its problem's pass rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.options import option
from trl_reasoning_distill.scripts.arguments import (
    SelectionArguments,
    describe_selection,
    make_selection,
    read_format_name,
    write_selection,
)
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.scripts.stage import Outcome, Stage, StageArguments, parser_of, settings_of, stage_main

if TYPE_CHECKING:
    from trl_reasoning_distill.data.manifest import StageRun


@dataclass(kw_only=True)
class SelectArguments(StageArguments):
    """What is selected from."""

    verified: str = option(help="Folder that the verify stage wrote.")


make_parser = parser_of(SelectArguments, SelectionArguments)


class Select(Stage):
    """Select training rows from verified traces."""

    name = "select"

    def __init__(self, options: SelectArguments, selection: SelectionArguments) -> None:
        from trl_reasoning_distill.teacher.selection import read_verified_traces

        self.options, self.selection, self.output_dir = options, selection, options.output_dir
        self.path = Path(options.verified) / "verdicts.jsonl"
        self.format_name = selection.response_format or read_format_name(self.path.parent)
        self.traces = read_verified_traces(self.path)
        self.settings = settings_of(options, selection) | {"response_format": self.format_name}
        self.inputs = {"verified": self.path}

    def plan(self) -> Plan:
        """What would be kept, and two of the traces that this decides on, of different verdicts if there are."""
        from trl_reasoning_distill.data.examples import describe_trace

        counts = make_selection(self.traces, self.selection, self.format_name)[1]
        line = f"select: of {len(self.traces):,} verified traces in {self.path} would be {describe_selection(counts)}"
        verdicts = list({trace.status: trace for trace in reversed(self.traces)}.values())[::-1]
        shown = verdicts[:2] if len(verdicts) > 1 else self.traces[:2]
        text = "\n".join([line, *(describe_trace(trace, trace) for trace in shown)])
        return Plan(text, rows=len(self.traces), makes=counts["rows"])

    def run(self, run: StageRun) -> Outcome:
        """Select."""
        counts = write_selection(self.traces, self.selection, self.format_name, run.output_dir)
        return counts, describe_selection(counts)


main = stage_main(Select, make_parser)

if __name__ == "__main__":
    main()
