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

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from trl_reasoning_distill.options import Bounds, Count, Positive, option
from trl_reasoning_distill.scripts.arguments import (
    SelectionArguments,
    describe_selection,
    read_format_name,
    write_selection,
)
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.scripts.stage import Outcome, Stage, StageArguments, parser_of, settings_of, stage_main

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.schema import Trace, VerifiedTrace

_CHUNK = 256
_EXAMPLES = 5  # of each disagreement between rules
_PARTIAL, _WHOLE = "verdicts.partial.jsonl", "verdicts.jsonl"


@dataclass(kw_only=True)
class VerifyArguments(StageArguments):
    """What is verified, and how long each comparison may take."""

    traces: str = option(help="Folder that the generate stage wrote, or a JSONL file of traces.")
    verify_timeout: Positive = option(2.0, "Seconds of computing that one symbolic comparison may take.")
    verify_workers: Count | None = option(
        None, "Processes for symbolic comparisons; default: as many as cores, at most 4."
    )
    tolerance: Annotated[float, Bounds(ge=0, lt=1)] = option(
        1e-6, "Relative tolerance of numbers that are written with decimals."
    )
    units: Literal["compare", "ignore"] = option(
        "compare", "compare: another unit is converted, another kind of unit is wrong; ignore: only the numbers count."
    )
    fuzzy: Annotated[float, Bounds(gt=0, le=100)] | None = option(
        None, "Count a word as right from this similarity of 100 to the gold word; default: never."
    )


make_parser = parser_of(VerifyArguments, SelectionArguments)


class Verify(Stage):
    """Verify traces, and select training rows from them."""

    name = "verify"

    def __init__(self, options: VerifyArguments, selection: SelectionArguments) -> None:
        from trl_reasoning_distill.data.files import read_jsonl
        from trl_reasoning_distill.data.schema import Trace

        self.options, self.selection, self.output_dir = options, selection, options.output_dir
        self.path = Path(options.traces)
        self.path = self.path / "traces.jsonl" if self.path.is_dir() else self.path
        self.format_name = selection.response_format or read_format_name(self.path.parent)
        rows = enumerate(read_jsonl(self.path), start=1)
        self.traces = [Trace.from_row(row, f"{self.path}, row {number}") for number, row in rows]
        if not self.traces:
            raise ValueError(f"{self.path} holds no traces. Run generate first.")
        self.settings = settings_of(options, selection) | {"response_format": self.format_name}
        del self.settings["verify_workers"]  # a stopped run may go on with more
        self.inputs = {"traces": self.path}

    def plan(self) -> Plan:
        """Counts, and the verdicts on two traces: of two problems, if there are two."""
        from trl_reasoning_distill.data.examples import describe_trace
        from trl_reasoning_distill.data.formatting import ReasoningFormat

        first = list({trace.problem_id: trace for trace in reversed(self.traces)}.values())[::-1]
        open_ended = sum(trace.gold_answer is None for trace in self.traces)
        cut = sum(trace.finish_reason == "length" for trace in self.traces)
        line = (
            f"verify: {len(self.traces):,} traces of {len(first):,} problems in {self.path} would be verified, as written in the format "
            f"{self.format_name!r}; {open_ended:,} have no gold answer, {cut:,} were cut at the token limit and are not trained on"
        )
        chosen = first[:2] if len(first) > 1 else self.traces[:2]
        verified = _verify_chunk(chosen, ReasoningFormat.preset(self.format_name), self.options)
        most = len(first) * self.selection.per_problem
        return Plan(
            "\n".join([line, *(describe_trace(one, one) for one in verified)]), rows=len(self.traces), makes=most
        )

    def run(self, run: StageRun) -> Outcome:
        """Verify, select, and summarise."""
        from trl_reasoning_distill.data.files import write_json

        verified = verify_traces(self.traces, self.format_name, self.options, run.output_dir)
        summary = summarize(verified)
        disagreements = find_disagreements(verified)
        write_json(run.output_dir / "summary.json", {**summary, "disagreements": disagreements})
        print("\n".join([describe_summary(summary), *describe_disagreements(disagreements)]))
        counts = write_selection(verified, self.selection, self.format_name, run.output_dir)
        return counts, (
            f"{counts['correct']} of {counts['traces']} traces correct ({counts['correct'] / counts['traces']:.1%}), "
            f"{counts['undecided']} undecided; {describe_selection(counts)}"
        )


def verify_traces(
    traces: Sequence[Trace], format_name: str, options: VerifyArguments, output_dir: Path
) -> list[VerifiedTrace]:
    """Verify traces against their gold answers, in order, with a progress bar.

    Chunk by chunk, the rows are appended to a file in `output_dir`; what stands there already is not verified again.

    Returns:
        The rows of `verdicts.jsonl`.
    """
    from tqdm import tqdm

    from trl_reasoning_distill.data.files import append_jsonl, read_jsonl_prefix
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.teacher.selection import read_verified_traces

    if (output_dir / _WHOLE).exists():  # it was the selection that failed
        return read_verified_traces(output_dir / _WHOLE)
    response_format = ReasoningFormat.preset(format_name)
    read_jsonl_prefix(output_dir / _PARTIAL)  # drops a line that a kill has torn
    verified = read_verified_traces(output_dir / _PARTIAL) if (output_dir / _PARTIAL).exists() else []
    if [_key(trace) for trace in verified] != [_key(trace) for trace in traces[: len(verified)]]:
        raise ValueError(f"{output_dir / _PARTIAL} holds verdicts of other traces. Give --overwrite to start anew.")
    correct = sum(trace.status == "correct" for trace in verified)
    with tqdm(total=len(traces), initial=len(verified), desc="verify", unit="trace") as bar:
        while len(verified) < len(traces):
            chunk = _verify_chunk(traces[len(verified) : len(verified) + _CHUNK], response_format, options)
            append_jsonl(output_dir / _PARTIAL, (trace.to_row() for trace in chunk))
            verified += chunk
            correct += sum(trace.status == "correct" for trace in chunk)
            bar.update(len(chunk))
            bar.set_postfix_str(f"{correct / len(verified):.1%} correct")
    os.replace(output_dir / _PARTIAL, output_dir / _WHOLE)
    return verified


def _key(trace: Trace) -> tuple[str, int]:
    return trace.problem_id, trace.sample


def _verify_chunk(
    chunk: Sequence[Trace], response_format: ReasoningFormat, options: VerifyArguments
) -> list[VerifiedTrace]:
    from trl_reasoning_distill.data.schema import VerifiedTrace
    from trl_reasoning_distill.teacher.selection import is_reasoning_ok
    from trl_reasoning_distill.verification.verify import verify_answers

    verdicts = verify_answers(
        [trace.completion for trace in chunk],
        [trace.gold_answer for trace in chunk],
        num_workers=options.verify_workers,
        timeout=options.verify_timeout,
        tolerance=options.tolerance,
        fuzzy=options.fuzzy,
        units=options.units,
    )
    return [
        VerifiedTrace(
            **trace.to_row(), **verdict.columns(), reasoning_ok=is_reasoning_ok(trace.completion, response_format)
        )
        for trace, verdict in zip(chunk, verdicts, strict=True)
    ]


def summarize(verified: Sequence[VerifiedTrace]) -> dict[str, dict[str, dict[str, int]]]:
    """How many traces, and how many of each status, for each method and each rule, most frequent first."""
    summary: dict[str, dict[str, dict[str, int]]] = {}
    for column in ("status", "method", "rule"):
        names = Counter(getattr(trace, column) for trace in verified)
        summary[column] = {
            name: {"traces": count, **Counter(trace.status for trace in verified if getattr(trace, column) == name)}
            for name, count in names.most_common()
        }
    return summary


def find_disagreements(verified: Sequence[VerifiedTrace]) -> dict[str, dict[str, Any]]:
    """Where two rules find different answers in one trace: for each pair of rules, the one that counted first, how many traces and examples."""
    from trl_reasoning_distill.verification.extract import rule_answers
    from trl_reasoning_distill.verification.verify import answer_key

    found: dict[str, dict[str, Any]] = {}
    for trace in verified:
        answers = rule_answers(trace.completion)
        taken = answers.get(trace.rule)
        for rule, answer in answers.items():
            if taken is None or rule == trace.rule or answer_key(answer) == answer_key(taken):
                continue
            kind = found.setdefault(f"{trace.rule}, not {rule}", {"traces": 0, "correct": 0, "examples": []})
            kind["traces"] += 1
            kind["correct"] += trace.status == "correct"
            if len(kind["examples"]) < _EXAMPLES:
                example = {"problem_id": trace.problem_id, "sample": trace.sample, "status": trace.status}
                kind["examples"].append(example | {"gold_answer": trace.gold_answer, trace.rule: taken, rule: answer})
    return dict(sorted(found.items(), key=lambda item: -item[1]["traces"]))


def describe_disagreements(disagreements: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines for a reader: each pair of rules with its count and its examples."""
    lines = []
    for rules, kind in disagreements.items():
        lines.append(f"  {rules}: {kind['traces']} traces, {kind['correct']} right")
        taken, _, other = rules.partition(", not ")
        lines += [
            f"    {example['problem_id']}/{example['sample']}: {taken} {example[taken]!r:.60}, {other} {example[other]!r:.60}, "
            f"gold answer {example['gold_answer']!r:.60}"
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


main = stage_main(Verify, make_parser)

if __name__ == "__main__":
    main()
