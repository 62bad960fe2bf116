"""Verify traces: which of the teacher's answers are right, and which of them to learn from.

    accelerate launch recipes/verify.py --config recipes/quickstart/verify.yaml
    trl-distill verify --traces runs/x/generate --output_dir runs/x/verify

Reads what `generate` wrote. Writes `verdicts.jsonl` (each trace with status, method, reason and rule: correct, incorrect or
undecided; a time-out or a crash is undecided, never wrong in silence), `summary.json` (shares by status, method and rule) and
`train.jsonl` (the selected traces as prompt and completion, ready for `sft`, `capture` and `distill`). To select anew from the same
verdicts, run `select`. Runs on one process, and goes on where it was stopped; answers that need algebra are compared in workers that
are killed at `verify_timeout`.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.selection import (
    SelectionArguments,
    describe_selection,
    read_format_name,
    write_selection,
)
from trl_reasoning_distill.scripts.stage import StageArguments, is_main_process, parse_stage, stage_main

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trl import TrlParser

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.schema import Trace

_CHUNK = 256
_EXAMPLES = 5  # of each disagreement between rules
_PARTIAL, _WHOLE = "verdicts.partial.jsonl", "verdicts.jsonl"


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
        default=1e-6, metadata={"help": "Relative tolerance of numbers that are written with decimals."}
    )
    units: str = field(
        default="compare",
        metadata={
            "help": "`compare`: another unit is converted, another kind of unit is wrong; `ignore`: only the numbers count."
        },
    )
    fuzzy: float | None = field(
        default=None,
        metadata={"help": "Count a word as right from this similarity of 100 to the gold word; default: never."},
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
        if self.units not in ("compare", "ignore"):
            raise ValueError(f"Wanted units 'compare' or 'ignore', found {self.units!r}.")
        if self.fuzzy is not None and not 0 < self.fuzzy <= 100:
            raise ValueError(f"Wanted 0 < fuzzy ≤ 100, found {self.fuzzy}.")


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

    from trl_reasoning_distill.data.files import read_jsonl, write_json
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.schema import Trace
    from trl_reasoning_distill.teacher.selection import VerifiedTrace

    path = Path(options.traces)
    path = path / "traces.jsonl" if path.is_dir() else path
    format_name = selection.response_format or read_format_name(path.parent)
    traces = [Trace.from_row(row, f"{path}, row {index}") for index, row in enumerate(read_jsonl(path), start=1)]
    if not traces:
        raise ValueError(f"{path} holds no traces. Run generate first.")
    if options.dry_run:
        _print_plan(traces, path, format_name, options)
        return
    settings = dataclasses.asdict(options) | dataclasses.asdict(selection) | {"response_format": format_name}
    del settings["verify_workers"]  # a stopped run may go on with more
    with StageRun("verify", options.output_dir, settings, {"traces": path}, overwrite=options.overwrite) as run:
        if run.is_finished:
            print(f"verify: nothing to do, {options.output_dir} holds this run's result")
            return
        rows = verify_traces(traces, format_name, options, run.output_dir)
        summary = summarize(rows)
        disagreements = find_disagreements(rows)
        write_json(run.output_dir / "summary.json", {**summary, "disagreements": disagreements})
        print(describe_summary(summary))
        for line in describe_disagreements(disagreements):
            print(line)
        verified = [VerifiedTrace.from_row(row) for row in rows]
        counts = write_selection(verified, selection, format_name, run.output_dir)
        result = (
            f"{counts['correct']} of {counts['traces']} traces correct ({counts['correct'] / counts['traces']:.1%}), "
            f"{counts['undecided']} undecided; {describe_selection(counts)}"
        )
        run.finish(counts, result)
        print(f"verify: {result}")


def _print_plan(traces: Sequence[Trace], path: Path, format_name: str, options: VerifyArguments) -> None:
    """What a real run would do, and what it would say of two traces: of two problems, if there are two."""
    from trl_reasoning_distill.data.examples import describe_trace
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.teacher.selection import VerifiedTrace

    first = list({trace.problem_id: trace for trace in reversed(traces)}.values())[::-1]
    open_ended = sum(trace.answer is None for trace in traces)
    cut = sum(trace.finish_reason == "length" for trace in traces)
    print(
        f"verify: {len(traces):,} traces of {len(first):,} problems in {path} would be verified, as written in the format "
        f"{format_name!r}; {open_ended:,} have no gold answer, {cut:,} were cut at the token limit and are not trained on"
    )
    chosen = first[:2] if len(first) > 1 else traces[:2]
    for row in _verify_chunk(chosen, ReasoningFormat.preset(format_name), options):
        verified = VerifiedTrace.from_row(row)
        print(describe_trace(verified, verified))


def verify_traces(
    traces: Sequence[Trace], format_name: str, options: VerifyArguments, output_dir: Path
) -> list[dict[str, Any]]:
    """Verify traces against their gold answers, in order, with a progress bar.

    Chunk by chunk, the rows are appended to a file in `output_dir`; what stands there already is not verified again.

    Returns:
        The rows of `verdicts.jsonl`: the columns of a `VerifiedTrace`.
    """
    from tqdm import tqdm

    from trl_reasoning_distill.data.files import append_jsonl, read_jsonl, read_jsonl_prefix
    from trl_reasoning_distill.data.formatting import ReasoningFormat

    if (output_dir / _WHOLE).exists():  # it was the selection that failed
        return list(read_jsonl(output_dir / _WHOLE))
    response_format = ReasoningFormat.preset(format_name)
    rows = read_jsonl_prefix(output_dir / _PARTIAL)
    if [(row["problem_id"], row["sample"]) for row in rows] != [(t.problem_id, t.sample) for t in traces[: len(rows)]]:
        raise ValueError(f"{output_dir / _PARTIAL} holds verdicts of other traces. Give --overwrite to start anew.")
    correct = sum(row["status"] == "correct" for row in rows)
    with tqdm(total=len(traces), initial=len(rows), desc="verify", unit="trace") as bar:
        while len(rows) < len(traces):
            chunk = _verify_chunk(traces[len(rows) : len(rows) + _CHUNK], response_format, options)
            append_jsonl(output_dir / _PARTIAL, chunk)
            rows += chunk
            correct += sum(row["status"] == "correct" for row in chunk)
            bar.update(len(chunk))
            bar.set_postfix_str(f"{correct / len(rows):.1%} correct")
    os.replace(output_dir / _PARTIAL, output_dir / _WHOLE)
    return rows


def _verify_chunk(
    chunk: Sequence[Trace], response_format: ReasoningFormat, options: VerifyArguments
) -> list[dict[str, Any]]:
    from trl_reasoning_distill.teacher.selection import VerifiedTrace, is_reasoning_ok
    from trl_reasoning_distill.verification.verify import verify_answers

    verdicts = verify_answers(
        [trace.completion for trace in chunk],
        [trace.answer for trace in chunk],
        num_workers=options.verify_workers,
        timeout=options.verify_timeout,
        tolerance=options.tolerance,
        fuzzy=options.fuzzy,
        units=options.units,  # type: ignore[arg-type]
    )
    rows = []
    for trace, verdict in zip(chunk, verdicts, strict=True):
        reasoning_ok = is_reasoning_ok(trace.completion, response_format)
        verified = VerifiedTrace(**trace.to_row(), **verdict.to_row(), reasoning_ok=reasoning_ok)
        rows.append(verified.to_row())
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """How many traces, and how many of each status, for each method and each rule, most frequent first."""
    summary: dict[str, dict[str, dict[str, int]]] = {}
    for column in ("status", "method", "rule"):
        names = Counter(row[column] for row in rows)
        summary[column] = {
            name: {"traces": count, **Counter(row["status"] for row in rows if row[column] == name)}
            for name, count in names.most_common()
        }
    return summary


def find_disagreements(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where two rules find different answers in one trace: for each pair of rules, the one that counted first, how many traces and examples."""
    from trl_reasoning_distill.verification.extract import rule_answers
    from trl_reasoning_distill.verification.verify import value_key

    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        answers = rule_answers(row["completion"])
        taken = answers.get(row["rule"])
        for rule, answer in answers.items():
            if taken is None or rule == row["rule"] or value_key(answer) == value_key(taken):
                continue
            kind = found.setdefault(f"{row['rule']}, not {rule}", {"traces": 0, "correct": 0, "examples": []})
            kind["traces"] += 1
            kind["correct"] += row["status"] == "correct"
            if len(kind["examples"]) < _EXAMPLES:
                example = {name: row[name] for name in ("problem_id", "sample", "status")}
                kind["examples"].append(example | {"gold": row["answer"], row["rule"]: taken, rule: answer})
    return dict(sorted(found.items(), key=lambda item: -item[1]["traces"]))


def describe_disagreements(disagreements: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines for a reader: each pair of rules with its count and its examples."""
    lines = []
    for rules, kind in disagreements.items():
        lines.append(f"  {rules}: {kind['traces']} traces, {kind['correct']} right")
        taken, _, other = rules.partition(", not ")
        lines += [
            f"    {example['problem_id']}/{example['sample']}: {taken} {example[taken]!r:.60}, {other} {example[other]!r:.60}, "
            f"gold {example['gold']!r:.60}"
            for example in kind["examples"]
        ]
    return lines


def describe_summary(summary: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """The shares of all traces, a line for each column; with rules, also the share that is right."""
    total = sum(counts["traces"] for counts in summary["status"].values())
    lines = []
    for column, groups in summary.items():
        parts = []
        for name, counts in groups.items():
            right = f" ({counts.get('correct', 0) / counts['traces']:.0%} right)" if column == "rule" else ""
            parts.append(f"{name} {counts['traces'] / total:.1%}{right}")
        lines.append(f"{column:>8}  " + " · ".join(parts))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
