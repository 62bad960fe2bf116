"""When does Top-K distillation beat fine-tuning on the text alone? Many settings, several seeds, equal budgets, paired tests.

    python benchmarks/distillation.py --output benchmarks/results/distillation
    python benchmarks/distillation.py --arms sft distilled --seeds 0 1 2 3 4
    python benchmarks/distillation.py --quick --json

The quickstart's teacher and student, by the recipe's own stages. A seed draws its own problems, its own samples of the teacher
and its own order of training; all arms of a seed share them, and see the same rows for the same number of steps. What is done
stays in `--work` and is not done again: stop it at any time, go on with the same command, add arms or seeds. The table counts
the seeds that an arm shares with its control.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_reasoning_distill.evaluation.compare import Comparison

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "quickstart"
CONFIGS = (RECIPE, REPOSITORY / "recipes" / "quickstart_gkd")  # a stage's YAML is in one of them
CONTROL, SHIPPED, TEACHER, BASE = "SFT", "distilled", "teacher", "base"
LONG_CONTROL = "SFT, epochs × 3"


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        stage: The stage that trains.
        group: What it is part of, for the table.
        options: Beside those of the recipe's YAML and the budget that all arms share.
        capture: Options of a teacher's store of its own; most arms share one.
        control: The arm that saw the same rows for as many steps, without a teacher.
    """

    stage: str
    group: str
    options: Mapping[str, Any] = field(default_factory=dict)
    capture: Mapping[str, Any] = field(default_factory=dict)
    control: str = CONTROL


def distilled(group: str, **options: Any) -> Arm:
    """SFT + Top-K from the store, with some options changed."""
    return Arm("distill", group, options)


def live(control: str = CONTROL, **options: Any) -> Arm:
    """The teacher is asked while the student trains, also on what the student writes; weight and rate as in the others."""
    return Arm("gkd", "live", {"kd_weight": 3.0, "learning_rate": 1e-3} | options, control=control)


ARMS = {
    CONTROL: Arm("sft", "main"),
    SHIPPED: distilled("main"),
    "SFT, epochs / 2": Arm("sft", "control", {"num_train_epochs": 0.5}),
    "SFT, lr / 2": Arm("sft", "control", {"learning_rate": 5e-4}),
    "α = 0.35": distilled("weight", kd_weight=0.35),
    "α = 1": distilled("weight", kd_weight=1.0),
    "α = 10": distilled("weight", kd_weight=10.0),
    "α = 10, lr × 2": distilled("rate", kd_weight=10.0, learning_rate=2e-3),
    "K = 1": distilled("K", kd_top_k=1),
    "K = 3": distilled("K", kd_top_k=3),
    "K = 25": distilled("K", kd_top_k=25),
    "T = 1": distilled("T", kd_temperature=1.0),
    "T = 4": Arm("distill", "T", {"kd_temperature": 4.0}, {"temperatures": [1.0, 4.0]}),
    "renormalized": distilled("support", kd_support="renormalized"),
    "reverse KL": distilled("support", kd_divergence="reverse_kl"),
    "adaptive K, top-p 0.95": distilled("support", kd_top_k=25, kd_top_p=0.95),
    "KL to the base 0.1": distilled("more", use_kl_regularization=True, kl_coef=0.1),
    "context: a worked example": Arm(
        "distill", "more", {}, {"teacher_context": "few_shot", "teacher_context_shots": 1}
    ),
    "live, half on the student's text": live(),
    "live, all on the student's text": live(lmbda=1.0, sft_weight=0.0),
    "live, α = 10, lr × 2": live(kd_weight=10.0, learning_rate=2e-3),
    LONG_CONTROL: Arm("sft", "control", {"num_train_epochs": 3.0}),
    "SFT, lr × 2, epochs × 3": Arm("sft", "control", {"num_train_epochs": 3.0, "learning_rate": 2e-3}),
    "distilled, epochs × 3": Arm("distill", "main", {"num_train_epochs": 3.0}, control=LONG_CONTROL),
    "live, α = 10, lr × 2, epochs × 3": live(LONG_CONTROL, kd_weight=10.0, learning_rate=2e-3, num_train_epochs=3.0),
}


SWEEPS = (("K", "kd_top_k", 10), ("T", "kd_temperature", 2.0), ("weight", "kd_weight", 3.0))
"""Groups of arms that change one option, the option, and its value in the recipe: the arm `SHIPPED`."""
VARIATIONS = ("weight", "rate", "K", "T", "support", "more")
"""Groups whose arms are also compared with `SHIPPED`: what does the option do?"""


class UnavailableError(Exception):
    """An arm that this version cannot train; the message says why."""


@dataclass
class Experiment:
    """The folders of one experiment, and the stages that fill them."""

    work: Path
    problems: int
    epochs: float
    test_problems: int

    def run(self, name: str, seed: int) -> None:
        """Train an arm with a seed and let it answer the test problems; what is done is not done again."""
        arm, data = ARMS[name], self._data(seed)
        output = self.folder(name, seed)
        if (output / "evaluate" / "manifest.json").is_file():
            return
        words: dict[str, Any] = {"dataset_path": data / "verify", "seed": seed, "disable_tqdm": True}
        words |= {"num_train_epochs": self.epochs} | arm.options
        words["num_train_epochs"] *= self.epochs if "num_train_epochs" in arm.options else 1
        if arm.stage == "distill":
            words["teacher_logits"] = self._capture(data, arm.capture)
        _run_stage(arm.stage, words, output / "train")
        self._evaluate(output, name, output / "train" / "final_model")

    def run_untrained(self, name: str) -> None:
        """Let the base or the teacher answer the test problems."""
        model = "student" if name == BASE else name
        self._evaluate(self.folder(name, None), name, RECIPE / "models" / model)

    def predictions(self, name: str, seed: int | None) -> list[dict[str, Any]]:
        """What an arm answered; empty if it has not."""
        from trl_reasoning_distill.data.files import read_jsonl

        folder = self.folder(name, seed) / "evaluate"
        if not (folder / "manifest.json").is_file():
            return []
        label = name if seed is None else f"{name}@{seed}"
        return [row | {"model": label} for row in read_jsonl(folder / "predictions.jsonl")]

    def folder(self, name: str, seed: int | None) -> Path:
        """Where an arm's results lie."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
        return self.work / ("untrained" if seed is None else f"seed-{seed}") / plain

    def _data(self, seed: int) -> Path:
        folder = self.work / f"seed-{seed}"
        asked = {"limit": self.problems, "problem_seed": seed + 1, "seed": seed}
        _run_stage("generate", asked, folder / "generate")
        _run_stage("verify", {"traces": folder / "generate"}, folder / "verify")
        return folder

    def _capture(self, data: Path, options: Mapping[str, Any]) -> Path:
        folder = data / "-".join(["capture", *options])
        return _run_stage("capture", {"dataset": data / "verify"} | dict(options), folder)

    def _evaluate(self, output: Path, name: str, model: Path) -> None:
        words = {"models": f"{name.replace('=', '')}={model}", "limit": self.test_problems}
        _run_stage("evaluate", words, output / "evaluate")


def _run_stage(name: str, options: Mapping[str, Any], output: Path) -> Path:
    """Run one stage of the recipe in this process, with some options changed, unless its result is there."""
    if (output / "manifest.json").is_file():
        return output
    config = next((path for folder in CONFIGS if (path := folder / f"{name}.yaml").is_file()), None)
    if config is None:
        raise UnavailableError(f"no recipe here has a {name}.yaml")
    words = ["--config", str(config), "--output_dir", str(output)]
    for key, value in options.items():
        words += [f"--{key}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    print(f"\n== {output}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(f"trl_reasoning_distill.scripts.{name}").main(words)
    return output


def run_all(experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, str]]:
    """Run all arms, seed by seed, and yield after each what could not be run."""
    skipped: dict[str, str] = {}
    for name in (BASE, TEACHER):
        experiment.run_untrained(name)
    for seed in seeds:
        for name in arms:
            if name not in skipped:
                try:
                    experiment.run(name, seed)
                except UnavailableError as reason:
                    skipped[name] = str(reason)
                yield skipped


def tabulate(experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per arm: accuracy, and the difference to its control over the seeds that both have."""
    from trl_reasoning_distill.evaluation.compare import compare_models

    untrained = [row for name in (BASE, TEACHER) for row in experiment.predictions(name, None)]
    answers = {name: {seed: rows for seed in seeds if (rows := experiment.predictions(name, seed))} for name in ARMS}

    def versus(name: str, other: str) -> tuple[list[int], Comparison]:
        shared = sorted(answers[name].keys() & answers[other].keys())
        rows = [row for arm in dict.fromkeys((name, other)) for seed in shared for row in answers[arm][seed]]
        return shared, compare_models(untrained + rows, control=other, student=name if name != other else "")

    table = []
    for name in arms:
        control = ARMS[name].control
        if not answers[name].keys() & answers[control].keys():
            continue
        shared, comparison = versus(name, control)
        result = comparison.models[name]
        row = {
            "arm": name,
            "group": ARMS[name].group,
            "seeds": shared,
            "accuracy": result.accuracy,
            "ci95": result.ci95,
            "by_seed": result.by_run or {str(seed): result.accuracy for seed in shared},
            "control": control if name != control else None,
            "gap_left_by_control_recovered": comparison.gap_left_by_control_recovered,
            "gap_left_by_control_recovered_ci95": comparison.gap_left_by_control_recovered_ci95,
            "gap_recovered": result.gap_recovered,
            "base": comparison.models[BASE].accuracy,
            "teacher": comparison.models[TEACHER].accuracy,
        }
        row |= _difference(comparison, name, control)
        if ARMS[name].group in VARIATIONS and answers[name].keys() & answers[SHIPPED].keys():
            shared, comparison = versus(name, SHIPPED)
            row["to_shipped"] = {"seeds": shared} | _difference(comparison, name, SHIPPED)
        table.append(row)
    return table


def _difference(comparison: Comparison, name: str, other: str) -> dict[str, Any]:
    pair = comparison.paired.get(f"{name}_vs_{other}")
    if pair is None:
        return dict.fromkeys(("difference", "difference_ci95", "p", "test"))
    return {"difference": pair.difference, "difference_ci95": pair.ci95, "p": pair.p, "test": pair.test}


def markdown(report: Mapping[str, Any]) -> str:
    """The tables for a reader."""
    rows = report["arms"]
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    lines = [f"`{report['command']}`", "", f"{settings}.", ""]
    if rows:
        lines += [f"Base {_percent(rows[0]['base'])}, teacher {_percent(rows[0]['teacher'])}.", ""]
    lines += [
        "| arm | seeds | accuracy | 95 % interval | its control | − control, points | 95 % interval | p | "
        "of the gap the control leaves | 95 % interval |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["arm"], str(len(row["seeds"])), _percent(row["accuracy"]), _interval(row["ci95"])]
        if row["control"] is None:
            cells += ["–"] * 6
        else:
            share, limits = (row[f"gap_left_by_control_recovered{end}"] for end in ("", "_ci95"))
            cells += [row["control"], *_difference_cells(row), _percent(share), _interval(limits)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "The control of an arm with a teacher is trained on the same rows for as many steps without one.",
        "",
        f'What an option does: the arms that change one or two of the arm "{SHIPPED}", against it.',
        "",
        f"| arm | seeds | − {SHIPPED}, points | 95 % interval | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if to_shipped := row.get("to_shipped"):
            cells = [row["arm"], str(len(to_shipped["seeds"])), *_difference_cells(to_shipped)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Intervals are a bootstrap over seeds and problems; p is a t-test with variance clustered by both (one seed: McNemar's exact "
        "test; of two or three seeds believe the dots rather than p, and of p's far below 0.001 only that they are small). Differences are paired by seed and problem.",
        "",
    ]
    lines += [f"Not run: {'; '.join(report['unrun'])}."] if report["unrun"] else []
    lines += [f"- {name}: skipped, {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def _difference_cells(row: Mapping[str, Any]) -> list[str]:
    p = f"{row['p']:.1e}" if row["p"] < 0.001 else f"{row['p']:.3f}"
    return [f"{100 * row['difference']:+.1f}", _interval(row["difference_ci95"]), p]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Differences to the controls, with their intervals and their seeds, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["arms"] if row["difference"] is not None]
    if not rows:
        return
    by_seed = {row["arm"]: row["by_seed"] for row in report["arms"]}
    matplotlib.rcParams |= {"svg.hashsalt": "distillation", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(figsize=(7, 0.36 * len(rows) + 1.1), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    lowest = -10.0
    for place, row in enumerate(rows):
        if 100 * row["difference_ci95"][1] < lowest:  # its place would leave the others none
            told = f"← {100 * row['difference']:.1f}".replace("-", "−")
            axes.text(0.01, place, told, transform=axes.get_yaxis_transform(), color="#dc6a28", va="center")
            continue
        axes.plot([100 * limit for limit in row["difference_ci95"]], [place, place], color="#2f74d0", linewidth=2)
        control = by_seed.get(row["control"], {})
        seeds = [100 * (value - control[seed]) for seed, value in row["by_seed"].items() if seed in control]
        axes.plot(seeds, [place] * len(seeds), "o", color="#2f74d0", alpha=0.35, markersize=4)
        axes.plot(100 * row["difference"], place, "D", color="#dc6a28", markersize=6)
    axes.set_yticks(range(len(rows)), [f"{row['arm']} ({len(row['seeds'])})" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("points over its control (95 %; dots: seeds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_sweeps(report: Mapping[str, Any], path: Path) -> None:
    """The difference to the control against K, T and α, a line per seed that all arms of the sweep have, as SVG."""
    from matplotlib import pyplot

    by_seed = {row["arm"]: row["by_seed"] for row in report["arms"]}
    if not {CONTROL, SHIPPED} <= by_seed.keys():
        return
    curves = []
    for group, option, shipped in SWEEPS:
        arms = {ARMS[name].options[option]: seeds for name, seeds in by_seed.items() if ARMS[name].group == group}
        curves.append(sorted((arms | {shipped: by_seed[SHIPPED]}).items()) if arms else [])
    if not all(curves):
        return
    figure, panels = pyplot.subplots(1, len(SWEEPS), figsize=(8, 2.6), layout="constrained", sharey=True)
    for axes, curve, (_, option, shipped) in zip(panels, curves, SWEEPS, strict=True):
        places = range(len(curve))
        seeds = sorted(set(by_seed[CONTROL]).intersection(*(accuracies for _, accuracies in curve)))
        lines = [[100 * (accuracies[seed] - by_seed[CONTROL][seed]) for _, accuracies in curve] for seed in seeds]
        for line in lines:
            axes.plot(places, line, "o-", color="#2f74d0", alpha=0.35, markersize=4, linewidth=1)
        means = [sum(points) / len(points) for points in zip(*lines, strict=True)]
        axes.plot(places, means, "D-", color="#dc6a28", markersize=6)
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set_xticks(places, [f"{value:g}{' *' if value == shipped else ''}" for value, _ in curve])
        axes.set_xlabel(f"{option} (* as shipped)")
        axes.set_title(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("points over SFT")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(report: Mapping[str, Any], output: Path) -> None:
    """`OUTPUT.json`, `OUTPUT.md`, `OUTPUT.svg` and `OUTPUT-sweeps.svg`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(markdown(report))
    plot(report, output.with_suffix(".svg"))
    plot_sweeps(report, output.with_name(f"{output.name}-sweeps.svg"))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else " to ".join(f"{100 * limit:.1f}" for limit in interval)


def main() -> None:
    """Run what is asked for and not done yet; print the table, and one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two arms, two seeds, few rows: does it run?")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2 3 4")
    parser.add_argument("--problems", type=int, help="training problems per seed (default 1000; 48 with --quick)")
    parser.add_argument("--epochs", type=float, help="passes over the rows (default 15; 1 with --quick)")
    parser.add_argument("--test_problems", type=int, help="default 1000; 24 with --quick")
    parser.add_argument("--work", type=Path, help="folder for what is made (default runs/benchmarks/distillation)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md, OUTPUT.json and OUTPUT.svg, after every arm")
    parser.add_argument("--table_only", action="store_true", help="train nothing; tabulate what is there")
    options = parser.parse_args()
    quick = options.quick
    arms = options.arms or ([CONTROL, SHIPPED] if quick else list(ARMS))
    seeds = options.seeds or ([0, 1] if quick else [0, 1, 2, 3, 4])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work = options.work or REPOSITORY / "runs" / "benchmarks" / ("distillation-quick" if quick else "distillation")
    experiment = Experiment(
        work.resolve(),
        options.problems or (48 if quick else 1000),
        options.epochs or (1.0 if quick else 15.0),
        options.test_problems or (24 if quick else 1000),
    )
    settings = {"problems": experiment.problems, "epochs": experiment.epochs, "test problems": experiment.test_problems}
    told = [word for word in sys.argv[1:] if word != "--table_only"]  # what made the figures, not what drew the table
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *told])

    def report(skipped: Mapping[str, str]) -> dict[str, Any]:
        table = tabulate(experiment, arms, seeds)
        unrun = sorted(set(arms) - {row["arm"] for row in table} - skipped.keys(), key=arms.index)
        told = {"arms": table, "unrun": unrun, "skipped": dict(skipped)}
        return {"command": command, "quick": quick, "settings": settings} | told

    os.chdir(REPOSITORY)  # the recipe's YAMLs name its models from here
    skipped: dict[str, str] = {}
    if not options.table_only:
        for skipped in run_all(experiment, arms, seeds):
            if options.output is not None:
                write(report(skipped), options.output)
    final = report(skipped)
    if options.output is not None:
        write(final, options.output)
    if not options.json:
        print(markdown(final))
    print(json.dumps(final))


if __name__ == "__main__":
    main()
