r"""The verifier: agreement with labels, beside other verifiers, and items per second.

    python benchmarks/verification.py --data FOLDER --output benchmarks/results/verification

`--data` holds `model_outputs/openai_gpt3_gsm8k.jsonl` (5276 real outputs with published labels), `gsm8k/test.jsonl`,
`equivalence_cases/math_verify.jsonl` (255 pairs with labels: the tests of math-verify), `answers/*.jsonl` (answers from public reports, with the right
verdict) and `math/math500.jsonl`, whose answers are rewritten and changed here (see `verification_cases.py`). Random answers of every type and reward
hacks come from the generators of the tests. `--further_cases` is a JSONL file of further (source, gold, pred, expected) rows. The other verifiers take
minutes: `--others_from REPORT.json` takes their figures from an earlier report on the same cases. The speed is of `verify_answers` with
two workers, fresh for each line but started before the clock; CPU seconds are those of this process and its workers, which a busy
machine stretches less than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import verification_baselines as baselines
from verification_cases import Case, load_cases

from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.reading import read
from trl_reasoning_distill.verification.verify import verify_answers

WORKERS = 2
GOALS = {"GSM8K outputs": 0.99, "equivalence cases": 0.98, "reported answers": 0.99}
ITEMS_PER_SECOND = {"GSM8K outputs": 5000.0, "mixed": 500.0, "algebra alone": 150.0}
_SMALL = 300
REPEATS = 5
"""Speeds are medians of so many runs."""
MIXED = (
    "equivalence cases",
    "reported answers",
    "MATH rewritten, development",
    "MATH changed, development",
    "MATH rewritten, held-out",
    "MATH changed, held-out",
    "random writings",
)
"""All but plain numbers."""


def judge_ours(cases: Sequence[Case]) -> list[Verdict]:
    """Our verdicts."""
    return verify_answers([case.output for case in cases], [case.gold for case in cases], num_workers=WORKERS)


def agreement(cases: Sequence[Case], said: Sequence[bool]) -> dict[str, dict[str, float]]:
    """For each group: cases, and how many are judged as labelled; false positives and negatives apart."""
    table: dict[str, dict[str, float]] = {}
    for case, right in zip(cases, said, strict=True):
        row = table.setdefault(case.group, {"cases": 0, "agree": 0, "false_positives": 0, "false_negatives": 0})
        row["cases"] += 1
        row["agree"] += right == case.expected
        row["false_positives"] += right and not case.expected
        row["false_negatives"] += case.expected and not right
    for row in table.values():
        row["agreement"] = round(row["agree"] / row["cases"], 4)
    return table


def disagreements(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[dict]:
    """Every case that is not judged as labelled; `number` counts within its group, from 0."""
    numbers: Counter[str] = Counter()
    found = []
    for case, verdict in zip(cases, verdicts, strict=True):
        if verdict.status != ("correct" if case.expected else "incorrect"):
            found.append({"number": numbers[case.group], **asdict(case), **asdict(verdict)})
        numbers[case.group] += 1
    return found


def speed(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Items per second of each group, of a mixture, and of what algebra decides: medians."""
    groups = {group: [case for case in cases if case.group == group] for group in dict.fromkeys(c.group for c in cases)}
    groups["mixed"] = [case for case in cases if case.group in MIXED]
    groups["algebra alone"] = [
        case
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.method == "symbolic" or verdict.status == "undecided"
    ]
    table = {}
    for name, members in groups.items():
        walls, cpus = [], []
        for _ in range(REPEATS):
            read.cache_clear()  # what is remembered of these cases
            wall, cpu = time.perf_counter(), _cpu_seconds()
            judge_ours(members)
            walls.append(time.perf_counter() - wall)
            cpus.append(_cpu_seconds() - cpu)
        wall, cpu = statistics.median(walls), max(statistics.median(cpus), 0.01)
        table[name] = {
            "items": len(members),
            "items_per_second": round(len(members) / wall, 1),
            "items_per_cpu_second": round(len(members) / cpu, 1),
        }
    return table


def _cpu_seconds() -> float:
    """Computing time of this process and its living workers, in seconds (Linux)."""
    ticks = 0
    for pid in (os.getpid(), *_children()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def table_of(report: dict) -> str:
    """The report as Markdown."""
    names = list(report["agreement"])
    lines = [f"`{report['command']}`", ""]
    if "others_command" in report:
        lines += [f"The other verifiers: `{report['others_command']}`", ""]
    lines += [f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.", ""]
    lines += [f"| false *correct* / false *incorrect* | n | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for group in report["agreement"]["ours"]:
        rows = [report["agreement"][name][group] for name in names]
        cells = [
            f"{row['false_positives']:.0f} / {row['false_negatives']:.0f}"
            + (f" of {row['cases']:.0f}" if row["cases"] < rows[0]["cases"] else "")
            for row in rows
        ]
        lines.append(f"| {group} | {rows[0]['cases']:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Wrong answers that are called correct, and right ones that are not. lm-eval's and Qwen2.5-Math's rules are written anew here; see `verification_baselines.py`.",
        "",
    ]
    if report["speed"]:
        lines += [f"| speed, {WORKERS} workers | items | items/s | items per CPU second |", "|---|---|---|---|"]
        for group, row in report["speed"].items():
            lines.append(f"| {group} | {row['items']} | {row['items_per_second']} | {row['items_per_cpu_second']} |")
        lines.append("")
    lines += ["| goal | measured | |", "|---|---|---|"]
    for goal in report["goals"]:
        state = "reached" if goal["reached"] else "missed"
        lines.append(f"| {goal['what']} ≥ {goal['limit']} | {goal['measured']} | {state} |")
    return "\n".join(lines) + "\n"


def sampled(cases: Sequence[Case], every: int) -> list[Case]:
    """Small groups whole, and every Nth case of the others."""
    sizes = Counter(case.group for case in cases)
    numbers: Counter[str] = Counter()
    found = []
    for case in cases:
        if sizes[case.group] <= _SMALL or numbers[case.group] % every == 0:
            found.append(case)
        numbers[case.group] += 1
    return found


def other_judges() -> dict[str, Callable[[Sequence[Case]], list[bool]]]:
    """The verifiers that can be asked here, by name."""
    return {
        "math-verify": baselines.math_verify_alone,
        "TRL accuracy_reward": baselines.trl_accuracy_reward,
        "lm-eval's rules": baselines.lm_eval_rules,
        "Qwen2.5-Math's rules": baselines.qwen_rules,
    }


def add_earlier_figures(report: dict[str, Any], path: Path) -> None:
    """Add the other verifiers' figures of an earlier report, and the command that made them."""
    earlier = json.loads(path.read_text())
    counts = [{group: row["cases"] for group, row in it["agreement"]["ours"].items()} for it in (report, earlier)]
    if counts[0] != counts[1]:
        raise SystemExit(f"{path} is about other cases.")
    report["agreement"] |= {name: rows for name, rows in earlier["agreement"].items() if name != "ours"}
    report["others_command"] = earlier.get("others_command", earlier["command"])


def make_report(verdicts: Sequence[Verdict], figures: dict[str, Any], speeds: dict[str, Any]) -> dict[str, Any]:
    """All figures, what made them, and whether they reach their goals."""
    measured = {f"agreement, {group}": (figures["ours"][group]["agreement"], limit) for group, limit in GOALS.items()}
    if speeds:
        measured |= {
            f"items/s, {name}": (speeds[name]["items_per_second"], limit) for name, limit in ITEMS_PER_SECOND.items()
        }
    words = [word.rpartition("/")[2] for word in sys.argv[1:]]
    return {
        "benchmark": "verification",
        "command": shlex.join(["python", "benchmarks/verification.py", *words]),
        "versions": {name: metadata.version(name) for name in ("math-verify", "sympy", "trl")},
        "agreement": figures,
        "undecided": sum(verdict.status == "undecided" for verdict in verdicts),
        "methods": dict(Counter(verdict.method for verdict in verdicts)),
        "speed": speeds,
        "goals": [
            {"what": what, "measured": value, "limit": limit, "reached": value >= limit}
            for what, (value, limit) in measured.items()
        ],
    }


def write(report: dict[str, Any], different: list[dict], output: Path) -> None:
    """The table, and the figures with the numbers of the cases that are not judged as labelled."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(table_of(report))
    # Which cases, not their texts: the data has its own licences.
    texts = ("output", "gold", "reason")
    short = [{key: value for key, value in row.items() if key not in texts} for row in different]
    output.with_suffix(".json").write_text(json.dumps(report | {"disagreements": short}, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--further_cases", type=Path)
    parser.add_argument(
        "--others_every",
        type=int,
        default=1,
        help="of large groups, ask the other verifiers, which are slow, every Nth",
    )
    parser.add_argument("--others_from", type=Path, help="take the other verifiers' figures from this report")
    parser.add_argument("--quick", action="store_true", help="every twentieth case, no speed")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--show", action="store_true", help="also print every case that is not judged as labelled")
    parser.add_argument("--output", type=Path, help="also write the table to OUTPUT.md and the figures to OUTPUT.json")
    options = parser.parse_args()
    cases = load_cases(options.data, options.further_cases)[:: 20 if options.quick else 1]
    verdicts = judge_ours(cases)
    different = disagreements(cases, verdicts)
    if options.show:
        for row in different:
            print(json.dumps(row, ensure_ascii=False), flush=True)
    speeds = {} if options.quick else speed(cases, verdicts)
    figures = {"ours": agreement(cases, [verdict.status == "correct" for verdict in verdicts])}
    report = make_report(verdicts, figures, speeds)
    if options.others_from:
        add_earlier_figures(report, options.others_from)
    for name, judge in ({} if options.others_from else other_judges()).items():
        asked = sampled(cases, options.others_every)
        print(f"asking {name} about {len(asked)} cases", file=sys.stderr, flush=True)
        figures[name] = agreement(asked, judge(asked))
    if options.output:
        write(report, different, options.output)
    if not options.json:
        print(table_of(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
