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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.evaluation.export import EXPORTS, export_results
from trl_reasoning_distill.evaluation.models import ModelSpec
from trl_reasoning_distill.options import Count, NamedWords, Positive, option
from trl_reasoning_distill.scripts.arguments import ProblemArguments, PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.planning import Plan, describe_prompts_of
from trl_reasoning_distill.scripts.stage import (
    Outcome,
    Stage,
    StageArguments,
    parser_of,
    settings_of,
    stage_main,
    warn_of_remote_code,
)
from trl_reasoning_distill.teacher.sampling import EngineArguments

if TYPE_CHECKING:
    from accelerate import PartialState

    from trl_reasoning_distill.data.manifest import StageRun


@dataclass(kw_only=True)
class EvaluateArguments(StageArguments):
    """The models, and how long a verdict may take."""

    models: NamedWords = option(
        help="Models as name=path; in YAML also a mapping of name to path, or to a mapping with `model` and engine options."
    )
    num_samples: Count = option(
        1, "Answers per problem, for pass@k and maj@k; more than one needs a temperature above 0."
    )
    export: list[str] = option(
        [], "Also write the results as another harness does, below output_dir/export: lm-eval, lighteval."
    )
    verify_timeout: Positive = option(2.0, "Seconds that verifying one answer may take; then it is undecided.")

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


make_parser = parser_of(EvaluateArguments, ProblemArguments, PromptArguments, SamplingArguments, EngineArguments)


class Evaluate(Stage):
    """Let models answer problems, and verify the answers."""

    name = "evaluate"
    is_parallel = True

    def __init__(
        self,
        options: EvaluateArguments,
        source: ProblemArguments,
        prompt: PromptArguments,
        sampling: SamplingArguments,
        engine: EngineArguments,
        state: PartialState,
    ) -> None:
        from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig

        self.options, self.source, self.engine, self.state = options, source, engine, state
        self.output_dir, self.seed = options.output_dir, sampling.seed
        self.models = parse_models(options.models)
        trusted = {name: spec for name, spec in self.models.items() if spec.trusts_remote_code}
        warn_of_remote_code([f"{name} {spec.model}" for name, spec in trusted.items()])
        response_format = prompt.make_format(source.source)
        self.config = EvaluationConfig(
            sampling.make_sampling(),
            response_format,
            sampling.seed,
            options.verify_timeout,
            options.num_samples,
        )
        self.problems = source.load()
        self.settings = settings_of(options, source, prompt, sampling, engine)
        self.settings["response_format"] = response_format.name
        del self.settings["export"]  # a finished evaluation can still be exported
        # Paths count by content, as inputs.
        self.settings["models"] = {name: dict(spec.options) for name, spec in self.models.items()}
        adapters = {name: spec.options["adapter"] for name, spec in self.models.items() if "adapter" in spec.options}
        self.inputs = {f"models.{name}": spec.model for name, spec in self.models.items()} | {"source": source.source}
        self.inputs |= {f"models.{name}.adapter": adapter for name, adapter in adapters.items()}

    def plan(self) -> Plan:
        """How much would be asked, and the first prompts as the models read them, once where they read the same."""
        config, count = self.config, len(self.problems)
        conversations = [config.messages(problem.question) for problem in self.problems]
        limit = config.sampling.max_new_tokens
        lines = [
            f"evaluate: {len(self.models)} models would each give {config.num_samples} answers to each of {count:,} problems"
        ]
        shown: list[str] = []
        for name, spec in self.models.items():
            text, shown = describe_prompts_of(spec.model, conversations, spec.arguments(self.engine), limit, shown)
            lines.append(f"{name} = {text}")
        return Plan("\n".join(lines), rows=count, tokens=count * limit * config.num_samples * len(self.models))

    def run(self, run: StageRun) -> Outcome:
        """Evaluate; on all ranks."""
        from trl_reasoning_distill.evaluation.evaluate import evaluate_models, result_line

        metrics = evaluate_models(
            self.models, self.problems, Path(self.output_dir), config=self.config, engine=self.engine
        )
        return (_counts(metrics), result_line(metrics)) if self.state.is_main_process else ({}, "")

    def after(self) -> None:
        """Write the results as other harnesses do, where that is asked for."""
        source = self.source
        task = f"{source.source}_{source.split}" if source.split else source.source
        for harness in self.options.export if self.state.is_main_process else ():
            export_results(harness, self.output_dir, task, self.settings)


def _counts(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    counts: dict[str, int | float] = {"problems": metrics["dataset"]["n"]}
    for name, model in metrics["models"].items():
        counts |= {f"{name}_{key}": model[key] for key in ("correct", "undecided", "tokens")}
    return counts


main = stage_main(Evaluate, make_parser)

if __name__ == "__main__":
    main()
