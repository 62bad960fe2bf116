"""Compare the models of an evaluation and write the page that says what was found: `report.html`.

    accelerate launch recipes/report.py --config recipes/quickstart/report.yaml
    trl-distill report --evaluation runs/x/evaluate --training sft=runs/x/sft distilled=runs/x/distill --store runs/x/capture/store --output_dir runs/x/report

Models are compared problem by problem: differences with bootstrap intervals and McNemar's exact test. The names `base`,
`teacher`, `sft` and `distilled` are roles; models of other names play them with `--base NAME` and so on. Writes `report.html`
(one file, opens anywhere, loads nothing), `report.md` and `comparison.json`. Needs the extra `report`.
"""

from __future__ import annotations

import dataclasses
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

    evaluation: str = field(
        default="",
        metadata={"help": "Folder that the evaluate stage wrote, with predictions.jsonl. Required."},
    )
    training: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Trainings whose curves are drawn, as name=folder; in YAML also a mapping of name to folder. A training that is "
            "named as its model is drawn in the model's colour."
        },
    )
    store: str | None = field(default=None, metadata={"help": "Top-K store that the student was trained on."})
    title: str = field(default="Reasoning distillation", metadata={"help": "Heading of the page."})
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
        super().__post_init__()
        if not self.evaluation:
            raise ValueError("evaluation is missing: give the folder that the evaluate stage wrote, with --evaluation.")
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
    """Run the stage."""
    (options,) = parse_stage(make_parser(), args)
    if not is_main_process():  # there is nothing to share between processes here
        return

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.evaluation.findings import result_line
    from trl_reasoning_distill.evaluation.report import write_report

    training = parse_trainings(options.training)
    predictions = Path(options.evaluation) / "predictions.jsonl"
    inputs = {"evaluation": predictions}
    inputs |= {f"training.{name}": Path(folder) / "trainer_state.json" for name, folder in training.items()}
    inputs |= {"store": Path(options.store) / "manifest.json"} if options.store else {}
    missing = [str(path) for path in inputs.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"Not there: {', '.join(missing)}. Run the stages that write them first.")
    page = Path(options.output_dir) / "report.html"
    if options.dry_run:
        print(f"report: would compare the models of {predictions} in {page}")
        return
    settings = dataclasses.asdict(options) | {"training": list(training)}  # what they are counts by content, as inputs
    with StageRun("report", options.output_dir, settings, inputs, options.seed, overwrite=options.overwrite) as run:
        if run.is_finished:
            print(f"report: nothing to do, {page} is there")
            return
        comparison = write_report(
            options.evaluation,
            options.output_dir,
            training=training,
            store=options.store,
            title=options.title,
            base=options.base,
            teacher=options.teacher,
            control=options.control,
            student=options.student,
            examples=options.examples,
            resamples=options.resamples,
            seed=options.seed,
        )
        counts = {"models": len(comparison.models), "problems": next(iter(comparison.models.values())).n}
        result = result_line(comparison, str(page))
        run.finish(counts, result)
        print(f"report: {result}")


if __name__ == "__main__":
    main()
