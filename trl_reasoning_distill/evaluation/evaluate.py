"""Answer problems with several models and verify the answers: `predictions.jsonl`, row by row, and `metrics.json`.

Every model answers every problem once, greedily by default, so that models can be compared problem by problem. Each answer is
written down with its verdict as it comes; a killed evaluation goes on where it stopped, with any number of ranks.

A model is a folder or hub name (of a model or a PEFT adapter). Prefixed with an engine, as in `openai:Qwen2.5-7B-Instruct`, it
is asked through that engine instead of the evaluation's own.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats
from tqdm import tqdm

from trl_reasoning_distill.data.files import write_json
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.rank_files import RankFiles
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.evaluation.reasoning import reasoning_metrics
from trl_reasoning_distill.teacher.engines import (
    ENGINES,
    Engine,
    EngineArguments,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    in_chunks,
    sample_seed,
)
from trl_reasoning_distill.teacher.processes import launch_state
from trl_reasoning_distill.verification.extract import extract_answer
from trl_reasoning_distill.verification.verify import verify_answers

PREDICTIONS_NAME = "predictions.jsonl"
METRICS_NAME = "metrics.json"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How models are asked and judged.

    Attributes:
        sampling: Greedy unless said otherwise.
        response_format: Writes the prompt, and is what the reasoning metrics hold responses against; `None` asks the bare
            question and judges form by what the text looks like.
        seed: For sampled answers.
        timeout: Seconds that verifying one answer may take; then it is undecided.
    """

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    response_format: ReasoningFormat | None = None
    seed: int = 0
    timeout: float = 2.0

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`."""
        if self.response_format is None:
            return [{"role": "user", "content": question}]
        return self.response_format.messages(question)


def evaluate_models(
    models: Mapping[str, str],
    problems: Iterable[Problem],
    output_dir: str | Path,
    *,
    config: EvaluationConfig | None = None,
    engine: EngineArguments | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate models one after the other on the same problems. Call it on every rank of a launch.

    Args:
        models: Name, as it will stand in the report, to model.
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
    _check(models, problems)
    state = launch_state()
    files = RankFiles(Path(output_dir) / PREDICTIONS_NAME, key=_key, rank=state.process_index)
    if state.is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        files.repair()
    state.wait_for_everyone()
    done = files.read()
    state.wait_for_everyone()  # nobody appends before everybody has read

    mine = problems[state.process_index :: state.num_processes]
    for name, model in models.items():
        remaining = [problem for problem in mine if not _is_done(done.get((name, problem.id)), model)]
        if remaining:
            loaded = _load(model, arguments)
            _answer(name, model, loaded, remaining, config, files, show_progress and state.is_main_process)
            del loaded
            _free_memory()

    state.wait_for_everyone()
    metrics: dict[str, Any] = {}
    if state.is_main_process:
        rows = files.merge((name, problem.id) for name in models for problem in problems)
        metrics = {
            "models": {
                name: summarize([row for row in rows if row["model"] == name], config.response_format)
                for name in models
            },
            "dataset": {"n": len(problems), "sources": sorted({problem.source for problem in problems})},
            "sampling": dataclasses.asdict(config.sampling) | {"seed": config.seed},
        }
        write_json(Path(output_dir) / METRICS_NAME, metrics)
    state.wait_for_everyone()
    return metrics


def summarize(rows: Sequence[Mapping[str, Any]], response_format: ReasoningFormat | None = None) -> dict[str, Any]:
    """The metrics of one model.

    `accuracy` is the share of *all* problems with an answer verified as correct. Undecided answers are neither right nor
    wrong: they stand beside it in `undecided`, and `accuracy_decided` leaves them out.

    Args:
        rows: The model's rows of `predictions.jsonl`.
        response_format: What the reasoning metrics hold responses against.

    Returns:
        `model_path`, `n`, `accuracy`, `ci95` (Wilson), `correct`, `incorrect`, `undecided`, `accuracy_decided`, `truncation_rate`,
        `no_answer_rate`, `undecided_rate`, `methods` and `rules` (counts), `mean_tokens`, `tokens`, `seconds`,
        `tokens_per_second`, `by_kind` and `reasoning`.
    """
    n = len(rows)
    statuses = Counter(row["status"] for row in rows)
    decided = n - statuses["undecided"]
    tokens, seconds = sum(row["num_tokens"] for row in rows), sum(row["seconds"] for row in rows)
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    return {
        "model_path": rows[0]["model_path"],
        "n": n,
        **_accuracy(rows),
        "correct": statuses["correct"],
        "incorrect": statuses["incorrect"],
        "undecided": statuses["undecided"],
        "accuracy_decided": statuses["correct"] / decided if decided else None,
        "truncation_rate": sum(row["finish_reason"] == "length" for row in rows) / n,
        "no_answer_rate": sum(row["answer"] is None for row in rows) / n,
        "undecided_rate": statuses["undecided"] / n,
        "methods": dict(Counter(row["method"] for row in rows if row["status"] == "correct").most_common()),
        "rules": dict(Counter(row["rule"] for row in rows).most_common()),
        "mean_tokens": tokens / n,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "by_kind": {kind: {"n": len(part), **_accuracy(part)} for kind, part in sorted(by_kind.items())},
        "reasoning": reasoning_metrics((row["output"] for row in rows), response_format),
    }


def result_line(metrics: Mapping[str, Any]) -> str:
    """One line for a reader: `base 12.0 % · teacher 91.2 % (n = 500)`, and how many answers are undecided, if any."""
    models = metrics["models"]
    scores = " · ".join(f"{name} {100 * model['accuracy']:.1f} %" for name, model in models.items())
    undecided = sum(model["undecided"] for model in models.values())
    return f"{scores} (n = {metrics['dataset']['n']}{f', {undecided} answers undecided' if undecided else ''})"


def _answer(
    name: str,
    model: str,
    engine: Engine,
    problems: Sequence[Problem],
    config: EvaluationConfig,
    files: RankFiles[tuple[str, str]],
    show_progress: bool,
) -> None:
    """Let one model answer problems, and write each answer with its verdict."""
    by_id = {problem.id: problem for problem in problems}
    requests = [
        GenerationRequest(problem.id, config.messages(problem.question), sample_seed(problem.id, 0, config.seed))
        for problem in problems
    ]
    answered = tokens = correct = 0
    started = time.perf_counter()
    with tqdm(
        total=len(problems), desc=f"evaluate {name}", unit="problem", disable=not show_progress, dynamic_ncols=True
    ) as bar:
        for chunk in in_chunks(engine.generate(requests, config.sampling)):
            rows = _judge(
                name, model, [(by_id[request.key], request, output) for request, output in chunk], config.timeout
            )
            files.append(rows)
            tokens += sum(row["num_tokens"] for row in rows)
            correct += sum(row["status"] == "correct" for row in rows)
            answered += len(rows)
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {correct / answered:.1%} correct", refresh=False)
            bar.update(len(rows))


def _judge(
    name: str, model: str, answers: Sequence[tuple[Problem, GenerationRequest, GenerationOutput]], timeout: float
) -> list[Row]:
    """Rows of `predictions.jsonl`."""
    verdicts = verify_answers(
        [output.text for _, _, output in answers], [problem.answer or "" for problem, _, _ in answers], timeout=timeout
    )
    rows = []
    for (problem, request, output), verdict in zip(answers, verdicts, strict=True):
        extracted = extract_answer(output.text)
        rows.append(
            {
                "model": name,
                "model_path": model,
                "problem_id": problem.id,
                "kind": problem.kind,
                "question": problem.question,
                "gold": problem.answer,
                "prompt": request.messages,
                "output": output.text,
                "answer": extracted.answer,
                "rule": extracted.rule,
                **verdict.to_row(),
                "finish_reason": output.finish_reason,
                "num_tokens": output.num_tokens,
                "prompt_tokens": output.prompt_tokens,
                "seconds": round(output.seconds, 6),
            }
        )
    return rows


def _load(model: str, arguments: EngineArguments) -> Engine:
    kind, colon, name = model.partition(":")
    return arguments.make_engine(name, kind) if colon and kind in ENGINES else arguments.make_engine(model)


def _free_memory() -> None:
    """Give a model's memory back before the next one is loaded."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["model"], row["problem_id"]


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


def _check(models: Mapping[str, str], problems: Sequence[Problem]) -> None:
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


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of correct answers and its interval (Wilson 1927)."""
    correct = sum(row["status"] == "correct" for row in rows)
    interval = stats.binomtest(correct, len(rows)).proportion_ci(0.95, method="wilson")
    return {"accuracy": correct / len(rows), "ci95": [float(interval.low), float(interval.high)]}
