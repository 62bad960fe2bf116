"""Measure cases side by side: time in one process, memory in a fresh process per case, medians, ratios with their goals.

A benchmark script makes a `Suite` and calls `Suite.main()`, which starts the script again as children: once to time all
cases, in interleaved rounds so that the noise of a shared machine falls on all alike, and once per case for its peak
memory. Each case first runs on a small problem to warm up.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[], Any]

_ALL = "all"


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
        cases: name to a function that takes the parsed options and `small` (for warming up) and returns what to run,
            as often as wanted. What the function allocates are inputs and does not count; all cases live in one process
            when they are timed, so large inputs should be shared.
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
        parser.add_argument("--rounds", type=int, help="timed runs of each case (default 5; 1 with --quick)")
        parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
        parser.add_argument("--cases", nargs="+", choices=list(self.cases), help="only these")
        parser.add_argument(
            "--output", type=Path, help="also write the table to OUTPUT.md and the figures to OUTPUT.json"
        )
        parser.add_argument("--plot", type=Path, help="also draw seconds and memory to this SVG file; needs matplotlib")
        parser.add_argument("--figures", type=Path, help="measure nothing, report the figures of this OUTPUT.json")
        parser.add_argument("--case", help=argparse.SUPPRESS)
        for name, (default, quick) in self.options.items():
            parser.add_argument(f"--{name}", type=type(default), help=f"default {default}; {quick} with --quick")
        options = parser.parse_args()
        for name, (default, quick) in self.options.items():
            if getattr(options, name) is None:
                setattr(options, name, quick if options.quick else default)
        if options.case == _ALL:
            print(json.dumps(self._time(options)))
        elif options.case:
            print(json.dumps(self._peak(options)))
        else:
            self._run_all(options)

    def _prepare(self, name: str, options: argparse.Namespace) -> Run:
        import torch

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.cases[name](options, True)()
        return self.cases[name](options, False)

    def _time(self, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
        """Seconds of each case, by name; the median over the rounds."""
        runs, results = {}, {}
        for name in options.cases or self.cases:
            try:
                runs[name] = self._prepare(name, options)
            except UnavailableError as reason:
                results[name] = {"skipped": str(reason)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        walls: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds):
            for name, run in runs.items():
                print(f"round {number + 1}/{options.rounds}: {name}", file=sys.stderr, flush=True)
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                _synchronize(options)
                walls[name].append(time.perf_counter() - wall)
                # On one thread the process's own time is the time of an idle machine, however busy this one is.
                own_time = options.threads == 1 and not _on_cuda(options)
                seconds[name].append(time.process_time() - cpu if own_time else walls[name][-1])
        for name in runs:
            results[name] = {
                "seconds": round(statistics.median(seconds[name]), 4),
                "wall_seconds": round(statistics.median(walls[name]), 4),
            }
        return results

    def _peak(self, options: argparse.Namespace) -> dict[str, Any]:
        """Peak memory of one case above its inputs."""
        try:
            run = self._prepare(options.case, options)
        except UnavailableError:
            return {}
        before = _memory(_on_cuda(options), reset=True)
        run()
        _synchronize(options)
        return {"peak_mib": round((_memory(_on_cuda(options)) - before) / 2**20, 1)}

    def _run_all(self, options: argparse.Namespace) -> None:
        report = json.loads(options.figures.read_text()) if options.figures else self._measure(options)
        table = self._table(report)
        if options.plot:
            draw(report, options.plot)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".md").write_text(table)
            options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        if not options.json:
            print(table)
        print(json.dumps(report))

    def _measure(self, options: argparse.Namespace) -> dict[str, Any]:
        options.rounds = options.rounds or (1 if options.quick else 5)
        figures = self._child(_ALL, options)
        for name in figures:
            if not options.json:
                print(f"memory: {name}", file=sys.stderr, flush=True)
            figures[name] |= self._child(name, options)
        return self._report(figures, options)

    def _child(self, name: str, options: argparse.Namespace) -> dict[str, Any]:
        command = [sys.executable, self.script, "--case", name, "--threads", str(options.threads)]
        command += ["--rounds", str(options.rounds)]
        for option in self.options:
            command += [f"--{option}", str(getattr(options, option))]
        if options.cases:
            command += ["--cases", *options.cases]
        log = subprocess.DEVNULL if options.json else None
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        return json.loads(done.stdout.splitlines()[-1])

    def _report(self, results: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
        import torch

        figures = {name: result for name, result in results.items() if "skipped" not in result}
        ratios = []
        for goal in self.goals:
            if goal.case in figures and goal.baseline in figures:
                ratio = figures[goal.case][goal.metric] / max(figures[goal.baseline][goal.metric], 1e-9)
                ratios.append(asdict(goal) | {"ratio": round(ratio, 3), "reached": ratio <= goal.limit})
        command = ["python", f"benchmarks/{Path(self.script).name}", *sys.argv[1:]]
        return {
            "command": shlex.join(command),
            "quick": options.quick,
            "settings": {name: getattr(options, name) for name in ("threads", "rounds", *self.options)},
            "machine": {
                "processor": platform.machine(),
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "bfloat16 matmuls": torch.cpu._is_avx512_bf16_supported(),
            },
            "figures": figures,
            "skipped": {name: result["skipped"] for name, result in results.items() if "skipped" in result},
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


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds and memory of each case as bars; this package's in another colour. Readable on light and dark pages."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark"})  # the same figures, the same file
    from matplotlib.figure import Figure

    figures = report["figures"]
    names = list(figures)[::-1]
    colours = ["#d97706" if name.startswith("ours") else "#8b93a1" for name in names]
    figure = Figure(figsize=(9, 0.3 * len(names) + 0.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric, label in ((left, "seconds", "seconds"), (right, "peak_mib", "peak memory, MiB")):
        bars = axes.barh(names, [figures[name][metric] for name in names], color=colours, height=0.7)
        axes.bar_label(bars, fmt="%.2f" if metric == "seconds" else "%.0f", padding=3, color="#808080", fontsize=8)
        axes.set_title(label, color="#808080", fontsize=10)
        axes.margins(x=0.15)
        axes.tick_params(colors="#808080", labelsize=8, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _on_cuda(options: argparse.Namespace) -> bool:
    return getattr(options, "device", "cpu") == "cuda"


def _synchronize(options: argparse.Namespace) -> None:
    if _on_cuda(options):
        import torch

        torch.cuda.synchronize()


def _memory(cuda: bool, reset: bool = False) -> int:
    """Peak bytes so far, after `reset` since then: of the device's allocator, or of the process's resident memory."""
    if cuda:
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what is freed must not hide what is allocated next
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
