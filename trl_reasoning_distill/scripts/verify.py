"""Verify traces: which of the teacher's answers are right, and which of them to learn from.

    accelerate launch recipes/verify.py --config recipes/quickstart/verify.yaml
    trl-distill verify --traces runs/x/generate --output_dir runs/x/verify

Reads what `generate` wrote. Writes `verdicts.jsonl` (each trace with status, method and reason: correct, incorrect or undecided;
a time-out or a crash is undecided, never wrong in silence) and `train.jsonl` (the selected traces as prompt and completion, ready
for `sft`, `capture` and `distill`). To select anew from the same verdicts, run `select`. Runs on one process; answers that need
algebra are compared in workers that are killed at `verify_timeout`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.select import (
    SelectionArguments,
    describe_selection,
    read_format_name,
    write_selection,
)
from trl_reasoning_distill.scripts.stage import StageArguments, is_main_process, parse_stage, stage_main

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl import TrlParser

    from trl_reasoning_distill.data.schema import Trace
    from trl_reasoning_distill.teacher.selection import VerifiedTrace

_CHUNK = 256


@dataclass
class VerifyArguments(StageArguments):
    """What is verified, and how long each comparison may take."""

    traces: str = field(
        default="", metadata={"help": "Folder that the generate stage wrote, or a JSONL file of traces. Required."}
    )
    verify_timeout: float = field(
        default=2.0, metadata={"help": "Seconds of computing that one symbolic comparison may take."}
    )
    verify_workers: int | None = field(
        default=None, metadata={"help": "Processes for symbolic comparisons; default: as many as cores, at most 4."}
    )
    tolerance: float = field(
        default=1e-6, metadata={"help": "Relative tolerance of numbers that are not both integers."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.traces:
            raise ValueError("traces is missing: give the folder that the generate stage wrote, with --traces.")
        if self.verify_timeout <= 0 or not 0 <= self.tolerance < 1 or (self.verify_workers or 1) < 1:
            raise ValueError(
                f"Wanted verify_timeout > 0, verify_workers ≥ 1 and 0 ≤ tolerance < 1; found {self.verify_timeout}, "
                f"{self.verify_workers} and {self.tolerance}."
            )


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((VerifyArguments, SelectionArguments), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, selection = parse_stage(make_parser(), args)
    if not is_main_process():
        return

    from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.schema import Trace

    path = Path(options.traces)
    path = path / "traces.jsonl" if path.is_dir() else path
    format_name = selection.response_format or read_format_name(path.parent)
    traces = [Trace.from_row(row, f"{path}, row {index}") for index, row in enumerate(read_jsonl(path), start=1)]
    if not traces:
        raise ValueError(f"{path} holds no traces. Run generate first.")
    if options.dry_run:
        print(f"verify: {len(traces)} traces in {path} would be verified, as written in the format {format_name!r}")
        return
    settings = dataclasses.asdict(options) | dataclasses.asdict(selection) | {"response_format": format_name}
    with StageRun("verify", options.output_dir, settings, {"traces": path}, overwrite=options.overwrite) as run:
        if run.is_finished:
            print(f"verify: nothing to do, {options.output_dir} holds this run's result")
            return
        verified = verify_traces(traces, format_name, options.verify_timeout, options.verify_workers, options.tolerance)
        write_jsonl(run.output_dir / "verdicts.jsonl", (trace.to_row() for trace in verified))
        counts = write_selection(verified, selection, format_name, run.output_dir)
        result = (
            f"{counts['correct']} of {counts['traces']} traces correct ({counts['correct'] / counts['traces']:.1%}), "
            f"{counts['undecided']} undecided; {describe_selection(counts)}"
        )
        run.finish(counts, result)
        print(f"verify: {result}")


def verify_traces(
    traces: Sequence[Trace],
    format_name: str,
    timeout: float = 2.0,
    num_workers: int | None = None,
    tolerance: float = 1e-6,
) -> list[VerifiedTrace]:
    """Verify traces against their gold answers, with a progress bar; the order is kept."""
    from tqdm import tqdm

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.teacher.selection import VerifiedTrace, is_reasoning_ok
    from trl_reasoning_distill.verification.verify import verify_answers

    response_format = ReasoningFormat.preset(format_name)
    verified = []
    with tqdm(total=len(traces), desc="verify", unit="trace") as bar:
        for start in range(0, len(traces), _CHUNK):
            chunk = traces[start : start + _CHUNK]
            verdicts = verify_answers(
                [trace.completion for trace in chunk],
                [trace.answer for trace in chunk],
                num_workers=num_workers,
                timeout=timeout,
                tolerance=tolerance,
            )
            for trace, verdict in zip(chunk, verdicts, strict=True):
                reasoning_ok = is_reasoning_ok(trace.completion, response_format)
                verified.append(VerifiedTrace(**trace.to_row(), **verdict.to_row(), reasoning_ok=reasoning_ok))
            bar.update(len(chunk))
    return verified


if __name__ == "__main__":
    main()
