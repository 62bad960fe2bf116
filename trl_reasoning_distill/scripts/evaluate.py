"""Evaluate models: each answers the same problems, and every answer is verified.

    accelerate launch recipes/evaluate.py --config recipes/quickstart/evaluate.yaml
    trl-distill evaluate --models base=Qwen/Qwen2.5-0.5B-Instruct distilled=runs/x/distill/final_model --source gsm8k --split test --output_dir runs/x/evaluate

In YAML, `models` is a mapping (`base: path`) or a list (`- base=path`). A model may be a folder, a hub name, or an adapter; with
`openai:NAME` or `vllm:NAME` it is asked through that engine. Writes `predictions.jsonl` (prompt, output, extracted answer,
verdict with its reason, tokens, time) and `metrics.json` (accuracy with a 95 % interval, rates of cut, missing and undecided
answers, by kind, form of the reasoning). A killed run goes on where it stopped. Then run `report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.problems import ProblemArguments, PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.stage import StageArguments, parse_stage, stage_main
from trl_reasoning_distill.teacher.engines import EngineArguments

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class EvaluateArguments(StageArguments):
    """The models, and how long a verdict may take."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Models as name=path; in YAML also a mapping of name to path. Required."},
    )
    verify_timeout: float = field(
        default=2.0, metadata={"help": "Seconds that verifying one answer may take; then it is undecided."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_models(self.models)


def parse_models(models: Mapping[str, Any] | Iterable[str]) -> dict[str, str]:
    """Name to model, from a mapping or from `name=path` words.

    Raises:
        ValueError: If there is none, a word is not `name=path`, or a name stands twice.
    """
    if isinstance(models, Mapping):
        pairs = [(str(name), path) for name, path in models.items()]
    else:
        pairs = [(name.strip(), path.strip()) for name, _, path in (str(word).partition("=") for word in models)]
    if not pairs:
        raise ValueError("models is missing: give at least one as name=path, such as --models base=models/student.")
    for name, path in pairs:
        if not name or not isinstance(path, str) or not path:
            raise ValueError(
                f"models: found {name!r} with {path!r}; write each as name=path, such as base=models/student."
            )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"models: a name stands twice in {[name for name, _ in pairs]}; each needs its own.")
    return dict(pairs)


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    dataclass_types = (EvaluateArguments, ProblemArguments, PromptArguments, SamplingArguments, EngineArguments)
    return TrlParser(dataclass_types, prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, source, prompt, sampling, engine = parse_stage(make_parser(), args)

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig, evaluate_models, result_line
    from trl_reasoning_distill.teacher.processes import launch_state

    models = parse_models(options.models)
    config = EvaluationConfig(sampling.make_sampling(), prompt.make_format(), sampling.seed, options.verify_timeout)
    problems = source.load()
    state = launch_state()
    if options.dry_run:
        if state.is_main_process:
            print(
                f"evaluate: {', '.join(f'{name} ({model})' for name, model in models.items())} on {len(problems)} problems of {source.source}"
            )
        return
    settings = {
        key: value
        for part in (options, source, prompt, sampling, engine)
        for key, value in dataclasses.asdict(part).items()
    }
    settings["models"] = list(models)  # what they are counts by content, as inputs
    inputs = {**{f"models.{name}": model for name, model in models.items()}, "source": source.source}
    run = StageRun(
        "evaluate",
        options.output_dir,
        settings,
        inputs,
        sampling.seed,
        overwrite=options.overwrite,
        is_main=state.is_main_process,
    )
    with run:
        state.wait_for_everyone()
        if run.is_finished:
            if state.is_main_process:
                print(f"evaluate: nothing to do, {options.output_dir} holds this run's result")
            return
        metrics = evaluate_models(models, problems, Path(options.output_dir), config=config, engine=engine)
        if state.is_main_process:
            result = result_line(metrics)
            run.finish(_counts(metrics), result)
            print(f"evaluate: {result}")


def _counts(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    counts: dict[str, int | float] = {"problems": metrics["dataset"]["n"]}
    for name, model in metrics["models"].items():
        counts |= {f"{name}_{key}": model[key] for key in ("correct", "undecided", "tokens")}
    return counts


if __name__ == "__main__":
    main()
