"""Compare the models of an evaluation and write the page that says what was found: `report.html`.

    trl-distill report runs/quickstart                     one run: its models
    trl-distill report runs/k5 runs/k10 runs/k25           several runs: a table sorted by effect
    accelerate launch recipes/report.py --config recipes/quickstart/report.yaml
    trl-distill report --evaluation runs/x/evaluate --training sft=runs/x/sft distilled=runs/x/distill --store runs/x/capture/store --output_dir runs/x/report

Models are compared problem by problem: differences with bootstrap intervals and McNemar's exact test. The names `base`,
`teacher`, `sft` and `distilled` are roles; models of other names play them with `--base NAME` and so on. Models named `sft@0`, `sft@1` are
runs of one model, and so are runs that differ in nothing but seeds: the statement is then about both, seeds and problems. Writes `report.html`
(one file, opens anywhere, loads nothing), `report.md`, `model_card.md` and `comparison.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trl_reasoning_distill.options import Bounds, CountOrZero, NamedWords, option
from trl_reasoning_distill.scripts.command import check_given
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.scripts.stage import Outcome, Stage, StageArguments, parser_of, settings_of, stage_main

if TYPE_CHECKING:
    from trl_reasoning_distill.data.manifest import StageRun


@dataclass(kw_only=True)
class ReportArguments(StageArguments):
    """What the report is made from, and how."""

    output_dir: str = option("", "Folder for the report. Default: `report` in the folder of the one run.")
    runs: list[str] = option(
        [],
        "Folders of whole runs, also as the first words: of one run all is found by itself, several are compared with each other.",
    )
    evaluation: str = option("", "Folder that the evaluate stage wrote, with predictions.jsonl. Required without runs.")
    training: NamedWords = option(
        [],
        "Trainings whose curves are drawn, as name=folder; in YAML also a mapping of name to folder. A training that is named as its "
        "model is drawn in the model's colour.",
    )
    store: str | None = option(None, "Top-K store that the student was trained on.")
    title: str | None = option(None, "Heading of the page; default: Reasoning distillation, or Ablations.")
    base: str = option("base", "Name of the model that training started from.")
    teacher: str = option("teacher", "Name of the teacher.")
    control: str = option("sft", "Name of the model that was trained on the text alone.")
    student: str = option("distilled", "Name of the distilled model.")
    examples: CountOrZero = option(4, "Problems shown for each outcome (fixed, broken, both right, neither right).")
    resamples: Annotated[int, Bounds(ge=100)] = option(10_000, "Bootstrap resamples behind each interval.")
    seed: CountOrZero = option(0, "Seed of the resampling and of the choice of examples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) == 1 and not self.output_dir:
            self.output_dir = str(Path(self.runs[0]) / "report")
        if self.runs and (self.evaluation or self.training or self.store):
            raise ValueError("runs say where evaluation, training and store are: give either the runs or the others.")
        if not self.runs and not self.evaluation:
            raise ValueError(
                "evaluation is missing: give the folder that the evaluate stage wrote, with --evaluation; or folders of runs."
            )
        check_given([] if self.output_dir else ["output_dir"])
        roles = (self.base, self.teacher, self.control, self.student)
        if len(set(roles)) < len(roles):
            raise ValueError(f"base, teacher, control and student must be four different names, found {list(roles)}.")
        self.training = parse_trainings(self.training)  # type: ignore[assignment]


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


make_parser = parser_of(ReportArguments)


class Report(Stage):
    """Compare the models of an evaluation, or several runs."""

    name = "report"

    def __init__(self, options: ReportArguments) -> None:
        if len(options.runs) == 1:
            _find(options)
        self.options, self.output_dir, self.seed = options, options.output_dir, options.seed
        self.settings = settings_of(options) | {"training": list(options.training)}  # it counts by content, as inputs
        self.inputs = _inputs(options)
        self.page = Path(options.output_dir) / "report.html"

    def plan(self) -> Plan:
        """What would be compared, and on how many problems."""
        from trl_reasoning_distill.evaluation.runs import read_predictions
        from trl_reasoning_distill.evaluation.scores import collect_scores

        options = self.options
        predictions = {name: Path(path) for name, path in self.inputs.items() if Path(path).name == "predictions.jsonl"}
        compared = f"{len(predictions)} runs" if len(predictions) > 1 else f"the models of {options.evaluation}"
        lines = [f"report: would compare {compared} in {self.page}, from {', '.join(map(str, self.inputs.values()))}"]
        roles = (options.base, options.teacher, options.control, options.student)
        for name, path in predictions.items():
            scores = collect_scores(read_predictions(path.parent))
            missing = [role for role in roles if role not in scores.models]
            line = f"{name}: {scores.n:,} problems × {scores.samples} answers of {', '.join(scores.models)}"
            lines.append(line + (f"; nobody plays {', '.join(missing)}" if missing else ""))
        return Plan("\n".join(lines))

    def run(self, run: StageRun) -> Outcome:
        """Write the page and what goes with it."""
        compare = _compare_runs if len(self.options.runs) > 1 else _report
        return compare(self.options, self.page)


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
    training: Mapping[str, str] = options.training  # type: ignore[assignment]  # read in `__post_init__`
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


main = stage_main(Report, make_parser)

if __name__ == "__main__":
    main()
