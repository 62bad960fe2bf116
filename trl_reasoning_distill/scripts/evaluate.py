"""Evaluate models: each answers the same problems, and every answer is verified.

    accelerate launch recipes/evaluate.py --config recipes/quickstart/evaluate.yaml
    trl-distill evaluate --models base=Qwen/Qwen2.5-0.5B-Instruct distilled=runs/x/distill/final_model --source gsm8k --split test --output_dir runs/x/evaluate

In YAML, `models` is a mapping (`base: path`) or a list (`- base=path`). A model may be a folder, a hub name, or an adapter; with
`openai:NAME` or `vllm:NAME` it is asked through that engine; a mapping gives it engine options of its own:
`teacher: {model: NAME, engine: openai, base_url: …}`, `small: {model: PATH, quantization: 4bit}`. Names such as `sft@0` and `sft@1`
are runs of one model. Writes `predictions.jsonl` (prompt, completion, extracted answer, verdict with its reason, tokens, time,
log-probability) and `metrics.json` (accuracy with a 95 % interval, rates of cut, missing and undecided answers, by kind, form of the
reasoning, calibration; with `--num_samples` also pass@k and maj@k). A killed run goes on where it stopped. `--export` writes the
results in the format of another harness too. Then run `report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.evaluation.export import EXPORTS, export_results
from trl_reasoning_distill.evaluation.models import ModelSpec
from trl_reasoning_distill.scripts.arguments import ProblemArguments, PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.stage import (
    StageArguments,
    open_run,
    parse_stage,
    settings_of,
    stage_main,
    warn_of_remote_code,
)
from trl_reasoning_distill.teacher.sampling import EngineArguments

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig


@dataclass
class EvaluateArguments(StageArguments):
    """The models, and how long a verdict may take."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Models as name=path; in YAML also a mapping of name to path, or to a mapping with `model` and engine options. Required."
        },
    )
    num_samples: int = field(
        default=1,
        metadata={"help": "Answers per problem, for pass@k and maj@k; more than one needs a temperature above 0."},
    )
    export: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also write the results as another harness does, below output_dir/export: lm-eval, lighteval."
        },
    )
    verify_timeout: float = field(
        default=2.0, metadata={"help": "Seconds that verifying one answer may take; then it is undecided."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_models(self.models)
        if unknown := sorted(set(self.export) - set(EXPORTS)):
            raise ValueError(f"export: {unknown} is unknown; there are {', '.join(EXPORTS)}.")


def parse_models(models: Mapping[str, Any] | Iterable[str]) -> dict[str, ModelSpec]:
    """Name to model, from a mapping or from `name=path` words; a path may also be a mapping with engine options, or that as JSON.

    Raises:
        ValueError: If there is none, a word is not `name=path`, a name stands twice, or a model cannot be read.
    """
    if isinstance(models, Mapping):
        pairs = [(str(name), path) for name, path in models.items()]
    else:
        pairs = [(name.strip(), path.strip()) for name, _, path in (str(word).partition("=") for word in models)]
    if not pairs:
        raise ValueError("models is missing: give at least one as name=path, such as --models base=models/student.")
    for name, path in pairs:
        if not name or not isinstance(path, (str, Mapping)) or not path:
            raise ValueError(
                f"models: found {name!r} with {path!r}; write each as name=path, such as base=models/student."
            )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"models: a name stands twice in {[name for name, _ in pairs]}; each needs its own.")
    return {name: ModelSpec.parse(path) for name, path in pairs}


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    dataclass_types = (EvaluateArguments, ProblemArguments, PromptArguments, SamplingArguments, EngineArguments)
    return TrlParser(dataclass_types, prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, source, prompt, sampling, engine = parse_stage(make_parser(), args)

    from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig, evaluate_models, result_line
    from trl_reasoning_distill.processes import launch_state

    models = parse_models(options.models)
    warn_of_remote_code([f"{name} {spec.model}" for name, spec in models.items() if spec.trusts_remote_code])
    response_format = prompt.make_format(source.source)
    config = EvaluationConfig(
        sampling.make_sampling(),
        response_format,
        sampling.seed,
        options.verify_timeout,
        options.num_samples,
    )
    problems = source.load()
    state = launch_state()
    if options.dry_run:
        if state.is_main_process:
            _print_plan(models, [config.messages(problem.question) for problem in problems], config, engine)
        return
    settings = settings_of(options, source, prompt, sampling, engine)
    settings["response_format"] = response_format.name
    settings.pop("export", None)  # a finished evaluation can still be exported
    # Paths count by content, as inputs.
    settings["models"] = {name: dict(spec.options) for name, spec in models.items()}
    inputs = {f"models.{name}": spec.model for name, spec in models.items()} | {"source": source.source}
    inputs |= {
        f"models.{name}.adapter": spec.options["adapter"] for name, spec in models.items() if "adapter" in spec.options
    }
    with open_run("evaluate", options, settings, inputs, sampling.seed, state) as run:
        if run is None:
            if state.is_main_process:
                _export(options, source, settings)
            return
        metrics = evaluate_models(models, problems, Path(options.output_dir), config=config, engine=engine)
        if state.is_main_process:
            _export(options, source, settings)
            result = result_line(metrics)
            run.finish(_counts(metrics), result)
            print(f"evaluate: {result}")


def _print_plan(
    models: Mapping[str, ModelSpec],
    conversations: list[list[dict[str, str]]],
    config: EvaluationConfig,
    engine: EngineArguments,
) -> None:
    """What a real run would do, and the first prompts as the models read them, once where they read the same."""
    from trl_reasoning_distill.scripts.planning import describe_prompts_of

    print(
        f"evaluate: {len(models)} models would each give {config.num_samples} answers to each of {len(conversations):,} problems"
    )
    shown: list[str] = []
    for name, spec in models.items():
        arguments, limit = spec.arguments(engine), config.sampling.max_new_tokens
        text, shown = describe_prompts_of(spec.model, conversations, arguments, limit, shown)
        print(f"{name} = {text}")


def _export(options: EvaluateArguments, source: ProblemArguments, settings: Mapping[str, Any]) -> None:
    """Write the results as other harnesses do, where that is asked for."""
    task = f"{source.source}_{source.split}" if source.split else source.source
    for harness in options.export:
        export_results(harness, options.output_dir, task, settings)


def _counts(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    counts: dict[str, int | float] = {"problems": metrics["dataset"]["n"]}
    for name, model in metrics["models"].items():
        counts |= {f"{name}_{key}": model[key] for key in ("correct", "undecided", "tokens")}
    return counts


if __name__ == "__main__":
    main()
