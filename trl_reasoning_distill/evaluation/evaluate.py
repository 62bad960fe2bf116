"""Answer problems with several models and verify the answers: `predictions.jsonl`, row by row, and `metrics.json`.

Every model answers every problem, greedily and once by default, so that models can be compared problem by problem; or several
times at a temperature, for pass@k and maj@k. Each answer is written down with its verdict as it comes; a killed evaluation goes
on where it stopped, with any number of ranks. Which models: see `models.py`; the metrics: `metrics.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import write_json
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Prediction, Problem
from trl_reasoning_distill.evaluation.metrics import count_steps, summarize
from trl_reasoning_distill.evaluation.models import ModelSpec
from trl_reasoning_distill.evaluation.runs import METRICS_NAME, PREDICTIONS_NAME
from trl_reasoning_distill.teacher.sampling import EngineArguments, SamplingConfig
from trl_reasoning_distill.teacher.sampling.loop import ResumableRows, Sample, draw_and_judge


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How models are asked and judged.

    Attributes:
        sampling: Greedy by default.
        response_format: Writes the prompt, and is what the reasoning metrics hold responses against; `None` asks the bare
            question and judges form by what the text looks like.
        seed: For sampled answers.
        timeout: Seconds that verifying one answer may take; then it is undecided.
        num_samples: Answers per problem; more than one needs a temperature.
    """

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    response_format: ReasoningFormat | None = None
    seed: int = 0
    timeout: float = 2.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: draw at least one answer per problem.")
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} at temperature=0 would be the same answer each time; set a temperature above 0."
            )

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`."""
        if self.response_format is None:
            return [{"role": "user", "content": question}]
        return self.response_format.messages(question)


def evaluate_models(
    models: Mapping[str, str | Mapping[str, Any] | ModelSpec],
    problems: Iterable[Problem],
    output_dir: str | Path,
    *,
    config: EvaluationConfig | None = None,
    engine: EngineArguments | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate models one after the other on the same problems. Call it on every rank of a launch.

    Args:
        models: Name in the report to model: a path, or a mapping with `model` and engine options of its own
            (see `ModelSpec`). Names such as `sft@0` and `sft@1` are runs of one model, which are compared as one.
        problems: With answers and distinct ids.
        output_dir: Folder for `predictions.jsonl` and `metrics.json`.
        config: How models are asked and judged.
        engine: What generates; default: transformers.
        show_progress: A bar on the main rank.

    Returns:
        On the main rank, what `metrics.json` holds: `{"models": {name: metrics}, "dataset": {…}, "sampling": {…}}`, with each
        model's metrics as `summarize` gives them; empty on other ranks.

    Raises:
        ValueError: If there is no model or problem, an answer is missing, an id doubled, or a model cannot be loaded.
    """
    problems, config, arguments = list(problems), config or EvaluationConfig(), engine or EngineArguments()
    specs = {name: model if isinstance(model, ModelSpec) else ModelSpec.parse(model) for name, model in models.items()}
    _check(specs, problems)
    folder = Path(output_dir)
    rows = ResumableRows(folder / PREDICTIONS_NAME, _key)
    work = [(problem, number) for problem in problems for number in range(config.num_samples)]
    mine = rows.share(work)
    for name, spec in specs.items():
        remaining = [
            (problem, number)
            for problem, number in mine
            if not _is_done(rows.done.get((name, problem.id, number)), spec.describe())
        ]
        if remaining:
            loaded = spec.load(arguments)
            for samples in draw_and_judge(
                loaded,
                [remaining],
                lambda problem: config.messages(problem.question),
                config.sampling,
                response_format=config.response_format,
                seed=config.seed,
                timeout=config.timeout,
                has_answers=len(remaining) < len(mine),
                label=f"evaluate {name}",
                show_progress=show_progress and rows.is_main,
            ):
                rows.append(_prediction(name, spec.describe(), sample).to_row() for sample in samples)
            del loaded
            _free_memory()

    merged = rows.finish((name, problem.id, number) for name in specs for problem, number in work)
    if not rows.is_main:
        return {}
    predictions = [Prediction.from_row(row) for row in merged]
    metrics = {
        "models": {
            name: summarize([each for each in predictions if each.model == name], config.response_format)
            for name in specs
        },
        "dataset": {"n": len(problems), "sources": sorted({problem.source for problem in problems})},
        "sampling": dataclasses.asdict(config.sampling) | {"num_samples": config.num_samples, "seed": config.seed},
    }
    write_json(folder / METRICS_NAME, metrics)
    return metrics


def result_line(metrics: Mapping[str, Any]) -> str:
    """One line for a reader: `base 12.0 % · teacher 91.2 % (n = 500)`, and how many answers are undecided, if any."""
    models = metrics["models"]
    scores = " · ".join(f"{name} {100 * model['accuracy']:.1f} %" for name, model in models.items())
    undecided = sum(model["undecided"] for model in models.values())
    return f"{scores} (n = {metrics['dataset']['n']}{f', {undecided} answers undecided' if undecided else ''})"


def _prediction(name: str, model: str, sample: Sample) -> Prediction:
    problem, output = sample.problem, sample.output
    return Prediction(
        model=name,
        model_path=model,
        problem_id=problem.id,
        sample=sample.number,
        kind=problem.kind,
        question=problem.question,
        gold_answer=problem.answer,
        reference_steps=count_steps(problem.solution) if problem.solution else None,
        prompt=sample.request.messages,
        completion=output.text,
        **sample.verdict.columns(),
        finish_reason=output.finish_reason,
        num_tokens=output.num_tokens,
        prompt_tokens=output.prompt_tokens,
        seconds=round(output.seconds, 6),
        mean_log_prob=None if output.mean_log_prob is None else round(output.mean_log_prob, 6),
    )


def _free_memory() -> None:
    """Give a model's memory back before the next one is loaded."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["problem_id"], row.get("sample", 0)


def _is_done(row: Mapping[str, Any] | None, model: str) -> bool:
    """Whether an earlier run has answered this, refusing an answer that another model gave under the same name."""
    if row is None:
        return False
    if row["model_path"] != model:
        raise ValueError(
            f"The output folder holds answers of {row['model_path']!r} under the name {row['model']!r}, which now means {model!r}. "
            "Give another output folder, or another name."
        )
    return True


def _check(models: Mapping[str, ModelSpec], problems: Sequence[Problem]) -> None:
    if not models:
        raise ValueError("There is no model to evaluate; give at least one as name=path.")
    if not problems:
        raise ValueError("There are no problems to evaluate on.")
    if open_ended := [problem.id for problem in problems if problem.answer is None]:
        raise ValueError(
            f"{len(open_ended)} problems have no answer to compare with, such as {open_ended[0]!r}; leave them out."
        )
    (problem_id, count), *_ = Counter(problem.id for problem in problems).most_common(1)
    if count > 1:
        raise ValueError(f"The id {problem_id!r} belongs to {count} problems; ids must be distinct.")
