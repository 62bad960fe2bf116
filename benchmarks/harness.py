"""Measure cases side by side: each run in a fresh process, rounds interleaved, medians, and ratios with their goals.

A benchmark script makes a `Suite` and calls `Suite.main()`. The parent process starts the script again with `--case NAME`
once per case and round; the child prepares its inputs, runs the case on a small problem to warm up, then measures once.
Interleaving the rounds spreads the noise of a shared machine over all cases.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[], Any]


class UnavailableError(Exception):
    """A case that cannot run here; the message says why."""


@dataclass(frozen=True)
class Goal:
    """A ratio that we promise: `case` over `baseline`, in `seconds` or `peak_mib`, at most `limit`."""

    case: str
    baseline: str
    limit: float
    metric: str = "seconds"


@dataclass
class Suite:
    """A benchmark.

    Attributes:
        script: the file that holds it.
        description: for `--help` and the head of the report.
        cases: name to a function that takes the parsed options and `small` (for warming up) and returns what to run;
            its allocations are inputs and do not count.
        goals: the ratios to print.
        options: name to (default, default with `--quick`): extra options, of the type of their defaults.
    """

    script: str
    description: str
    cases: dict[str, Callable[[argparse.Namespace, bool], Run]]
    goals: list[Goal]
    options: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def main(self) -> None:
        """Parse the command line; run one case (as a child) or all of them."""
        parser = argparse.ArgumentParser(description=self.description)
        parser.add_argument("--quick", action="store_true", help="small shapes, one round: does it run?")
        parser.add_argument("--json", action="store_true", help="print only the JSON object")
        parser.add_argument("--rounds", type=int, help="runs of each case (default 3; 1 with --quick)")
        parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
        parser.add_argument("--cases", nargs="+", choices=list(self.cases), help="only these")
        parser.add_argument(
            "--output", type=Path, help="also write the table to OUTPUT.md and the figures to OUTPUT.json"
        )
        parser.add_argument("--case", help=argparse.SUPPRESS)
        for name, (default, quick) in self.options.items():
            parser.add_argument(f"--{name}", type=type(default), help=f"default {default}; {quick} with --quick")
        options = parser.parse_args()
        for name, (default, quick) in self.options.items():
            if getattr(options, name) is None:
                setattr(options, name, quick if options.quick else default)
        if options.case:
            print(json.dumps(self._measure(options)))
        else:
            self._run_all(options)

    def _measure(self, options: argparse.Namespace) -> dict[str, Any]:
        import torch

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        try:
            self.cases[options.case](options, True)()
            run = self.cases[options.case](options, False)
        except UnavailableError as reason:
            return {"skipped": str(reason)}
        cuda = torch.cuda.is_available() and getattr(options, "device", "cpu") == "cuda"
        before = _memory(cuda, reset=True)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        # On one thread the process's own time is the time of an idle machine, however busy this one is.
        return {
            "seconds": cpu if options.threads == 1 and not cuda else wall,
            "wall_seconds": wall,
            "peak_mib": (_memory(cuda) - before) / 2**20,
        }

    def _run_all(self, options: argparse.Namespace) -> None:
        names = options.cases or list(self.cases)
        rounds = options.rounds or (1 if options.quick else 3)
        settings = {name: getattr(options, name) for name in self.options}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                if not options.json:
                    print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr)
                measured[name].append(self._child(name, options, settings))
        report = self._report(measured, options, settings)
        table = self._table(report)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".md").write_text(table)
            options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        if not options.json:
            print(table)
        print(json.dumps(report))

    def _child(self, name: str, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, self.script, "--case", name, "--threads", str(options.threads)]
        for option, value in settings.items():
            command += [f"--{option}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def _report(
        self, measured: dict[str, list[dict[str, Any]]], options: argparse.Namespace, settings: dict[str, Any]
    ) -> dict[str, Any]:
        import torch

        figures = {
            name: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
            for name, runs in measured.items()
            if "skipped" not in runs[0]
        }
        ratios = []
        for goal in self.goals:
            if goal.case in figures and goal.baseline in figures:
                ratio = figures[goal.case][goal.metric] / max(figures[goal.baseline][goal.metric], 1e-9)
                ratios.append(asdict(goal) | {"ratio": round(ratio, 3), "reached": ratio <= goal.limit})
        command = ["python", f"benchmarks/{Path(self.script).name}", *sys.argv[1:]]
        return {
            "command": " ".join(command),
            "quick": options.quick,
            "settings": settings | {"threads": options.threads, "rounds": len(next(iter(measured.values())))},
            "machine": {
                "processor": platform.machine(),
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
            },
            "figures": figures,
            "skipped": {name: runs[0]["skipped"] for name, runs in measured.items() if "skipped" in runs[0]},
            "ratios": ratios,
        }

    def _table(self, report: dict[str, Any]) -> str:
        machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
        lines = [f"`{report['command']}`", "", f"Medians; {machine}; {report['settings']}.", ""]
        if report["quick"]:
            lines += ["The goals are for the full shapes; `--quick` only shows that everything runs.", ""]
        lines += ["| case | seconds | wall | peak MiB |", "|---|---|---|---|"]
        for name, figures in report["figures"].items():
            lines.append(
                f"| {name} | {figures['seconds']:.3f} | {figures['wall_seconds']:.3f} | {figures['peak_mib']:.0f} |"
            )
        lines += [f"| {name} | skipped: {reason} | | |" for name, reason in report["skipped"].items()]
        lines += ["", "| ratio | of | goal | measured | |", "|---|---|---|---|---|"]
        for ratio in report["ratios"]:
            lines.append(
                f"| {ratio['case']} / {ratio['baseline']} | {ratio['metric']} | ≤ {ratio['limit']:.2f} | "
                f"{ratio['ratio']:.2f} | {'reached' if ratio['reached'] else 'missed'} |"
            )
        return "\n".join(lines) + "\n"


def _memory(cuda: bool, reset: bool = False) -> int:
    """Peak bytes so far, after `reset` since then: of the device's allocator, or of the process's resident memory."""
    if cuda:
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
