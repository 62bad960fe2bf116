"""Compare the models of an evaluation and write the page that says what was found: `report.html`.

    trl-distill report runs/quickstart                     one run: its models
    trl-distill report runs/k5 runs/k10 runs/k25           several runs: a table sorted by effect
    accelerate launch recipes/report.py --config recipes/quickstart/report.yaml
    trl-distill report --evaluation runs/x/evaluate --training sft=runs/x/sft distilled=runs/x/distill --store runs/x/capture/store --output_dir runs/x/report

Models are compared problem by problem: differences with bootstrap intervals and McNemar's exact test. The names `base`,
`teacher`, `sft` and `distilled` are roles; models of other names play them with `--base NAME` and so on. Models named `sft@0`, `sft@1` are
runs of one model, and so are runs that differ in nothing but seeds: the statement is then about both, seeds and problems. Writes `report.html`
(one file, opens anywhere, loads nothing), `report.md`, `model_card.md` and `comparison.json`. Needs the extra `report`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.stage import StageArguments, is_main_process, parse_stage, stage_main

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class ReportArguments(StageArguments):
    """What the report is made from, and how."""

    runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of whole runs, also as the first words: of one run all is found by itself, several are compared with each other."
        },
    )
    evaluation: str = field(
        default="",
        metadata={"help": "Folder that the evaluate stage wrote, with predictions.jsonl. Required without runs."},
    )
    training: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Trainings whose curves are drawn, as name=folder; in YAML also a mapping of name to folder. A training that is "
            "named as its model is drawn in the model's colour."
        },
    )
    store: str | None = field(default=None, metadata={"help": "Top-K store that the student was trained on."})
    title: str | None = field(
        default=None, metadata={"help": "Heading of the page; default: Reasoning distillation, or Ablations."}
    )
    base: str = field(default="base", metadata={"help": "Name of the model that training started from."})
    teacher: str = field(default="teacher", metadata={"help": "Name of the teacher."})
    control: str = field(default="sft", metadata={"help": "Name of the model that was trained on the text alone."})
    student: str = field(default="distilled", metadata={"help": "Name of the distilled model."})
    examples: int = field(
        default=4, metadata={"help": "Problems shown for each outcome (fixed, broken, both right, neither right)."}
    )
    resamples: int = field(default=10_000, metadata={"help": "Bootstrap resamples behind each interval."})
    seed: int = field(default=0, metadata={"help": "Seed of the resampling and of the choice of examples."})

    def __post_init__(self) -> None:
        if len(self.runs) == 1 and not self.output_dir:
            self.output_dir = str(Path(self.runs[0]) / "report")
        super().__post_init__()
        if self.runs and (self.evaluation or self.training or self.store):
            raise ValueError("runs say where evaluation, training and store are: give either the runs or the others.")
        if not self.runs and not self.evaluation:
            raise ValueError(
                "evaluation is missing: give the folder that the evaluate stage wrote, with --evaluation; or folders of runs."
            )
        for name, minimum in (("examples", 0), ("resamples", 100), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} must be a whole number of {minimum} or more, found {value!r}.")
        roles = (self.base, self.teacher, self.control, self.student)
        if len(set(roles)) < len(roles):
            raise ValueError(f"base, teacher, control and student must be four different names, found {list(roles)}.")
        parse_trainings(self.training)


def parse_trainings(trainings: Mapping[str, Any] | Iterable[str]) -> dict[str, str]:
    """Name to folder, from a mapping or from `name=folder` words.

    Raises:
        ValueError: If a word is not `name=folder`, or a name stands twice.
    """
    if isinstance(trainings, Mapping):
        pairs = [(str(name), folder) for name, folder in trainings.items()]
    else:
        pairs = [(name, folder) for name, _, folder in (str(word).partition("=") for word in trainings)]
    for name, folder in pairs:
        if not name or not isinstance(folder, str) or not folder:
            raise ValueError(
                f"training: found {name!r} with {folder!r}; write each as name=folder, such as sft=runs/x/sft."
            )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"training: a name stands twice in {[name for name, _ in pairs]}; each needs its own.")
    return dict(pairs)


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((ReportArguments,), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage; folders of runs may stand first, without `--runs`."""
    words = list(sys.argv[1:] if args is None else args)
    if words and not words[0].startswith("-"):
        words.insert(0, "--runs")
    (options,) = parse_stage(make_parser(), words)
    if not is_main_process():  # there is nothing to share between processes here
        return

    from trl_reasoning_distill.data.manifest import StageRun

    options.training = parse_trainings(options.training)
    if len(options.runs) == 1:
        _find(options)
    inputs = _inputs(options)
    page = Path(options.output_dir) / "report.html"
    if options.dry_run:
        _print_plan(options, inputs, page)
        return
    settings = dataclasses.asdict(options) | {"training": list(options.training)}  # it counts by content, as inputs
    with StageRun("report", options.output_dir, settings, inputs, options.seed, overwrite=options.overwrite) as run:
        if run.is_finished:
            print(f"report: nothing to do, {page} is there")
            return
        counts, result = _compare_runs(options, page) if len(options.runs) > 1 else _report(options, page)
        run.finish(counts, result)
        print(f"report: {result}")


def _print_plan(options: ReportArguments, inputs: Mapping[str, Path], page: Path) -> None:
    """What a real run would compare, and on how many problems."""
    from trl_reasoning_distill.evaluation.runs import read_predictions
    from trl_reasoning_distill.evaluation.scores import collect_scores

    predictions = {name: path for name, path in inputs.items() if path.name == "predictions.jsonl"}
    compared = f"{len(predictions)} runs" if len(predictions) > 1 else f"the models of {options.evaluation}"
    print(f"report: would compare {compared} in {page}, from {', '.join(map(str, inputs.values()))}")
    roles = (options.base, options.teacher, options.control, options.student)
    for name, path in predictions.items():
        scores = collect_scores(read_predictions(path.parent))
        missing = [role for role in roles if role not in scores.models]
        print(
            f"{name}: {scores.n:,} problems × {scores.samples} answers of {', '.join(scores.models)}"
            + (f"; nobody plays {', '.join(missing)}" if missing else "")
        )


def _find(options: ReportArguments) -> None:
    """Fill in what a run's folder holds."""
    from trl_reasoning_distill.evaluation.runs import read_run

    run = read_run(options.runs[0])
    options.evaluation, options.runs = str(run.evaluation), []
    options.training = {name: str(folder) for name, folder in run.training.items()}  # type: ignore[assignment]
    options.store = str(run.store) if run.store else None


def _inputs(options: ReportArguments) -> dict[str, Path]:
    """The files that the report rests on.

    Raises:
        FileNotFoundError: If one is not there.
    """
    if options.runs:
        from trl_reasoning_distill.evaluation.runs import read_run

        found = [read_run(folder) for folder in options.runs]
        return {f"runs.{run.name}": run.evaluation / "predictions.jsonl" for run in found}
    training: Mapping[str, str] = options.training  # type: ignore[assignment]
    inputs = {"evaluation": Path(options.evaluation) / "predictions.jsonl"}
    inputs |= {f"training.{name}": Path(folder) / "trainer_state.json" for name, folder in training.items()}
    inputs |= {"store": Path(options.store) / "manifest.json"} if options.store else {}
    missing = [str(path) for path in inputs.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"Not there: {', '.join(missing)}. Run the stages that write them first.")
    return inputs


def _report(options: ReportArguments, page: Path) -> tuple[dict[str, int | float], str]:
    from trl_reasoning_distill.evaluation.findings import result_line
    from trl_reasoning_distill.evaluation.report import write_report

    comparison = write_report(
        options.evaluation,
        options.output_dir,
        training=options.training,  # type: ignore[arg-type]
        store=options.store,
        title=options.title or "Reasoning distillation",
        examples=options.examples,
        **_shared(options),
    )
    counts: dict[str, int | float] = {
        "models": len(comparison.models),
        "problems": next(iter(comparison.models.values())).n,
    }
    return counts, result_line(comparison, str(page))


def _compare_runs(options: ReportArguments, page: Path) -> tuple[dict[str, int | float], str]:
    from trl_reasoning_distill.evaluation.ablation import result_line, write_ablation_report

    settings = write_ablation_report(
        options.runs, options.output_dir, title=options.title or "Ablations", **_shared(options)
    )
    return {"runs": len(options.runs), "settings": len(settings)}, result_line(settings, str(page))


def _shared(options: ReportArguments) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("base", "teacher", "control", "student", "resamples", "seed")}


if __name__ == "__main__":
    main()
