"""An evaluation in the format of another harness, for the tools that read those: lm-eval's and lighteval's result files.

Only the format is theirs. The answers are ours, and so is the rule that judged them, so the metric is named for it
(`verified`): a figure of lm-eval's own `exact_match` comes from lm-eval.

- `lm-eval` (0.4): `export/lm-eval/MODEL/results_DATE.json` and `samples_TASK_DATE.jsonl`, as `lm_eval --output_path --log_samples`.
- `lighteval` (0.13): `export/lighteval/results/MODEL/results_DATE.json` and
  `export/lighteval/details/MODEL/DATE/details_TASK_DATE.parquet`, as `lighteval … --output-dir --save-details`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_json, write_json, write_jsonl
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.runs import METRICS_NAME, read_predictions

EXPORTS = ("lm-eval", "lighteval")
METRIC = "verified"
FOLDER = "export"


def export_results(harness: str, evaluation_dir: str | Path, task: str, settings: Mapping[str, Any]) -> list[Path]:
    """Write the results of a finished evaluation as `harness` does.

    Args:
        harness: One of `EXPORTS`.
        evaluation_dir: Folder with `predictions.jsonl` and `metrics.json`; the files go into its folder `export/`.
        task: Name of the problems' source.
        settings: Options of the evaluation, for the record.

    Returns:
        The result file of each model.

    Raises:
        ValueError: For an unknown harness.
    """
    if harness not in EXPORTS:
        raise ValueError(f"Unknown format {harness!r}; there are {', '.join(EXPORTS)}.")
    folder = Path(evaluation_dir)
    metrics = read_json(folder / METRICS_NAME)
    rows: dict[str, list[Prediction]] = {name: [] for name in metrics["models"]}
    for prediction in read_predictions(folder):
        rows[prediction.model].append(prediction)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    task = re.sub(r"[^\w.-]+", "_", Path(task).name)
    export = _to_lm_eval if harness == "lm-eval" else _to_lighteval
    root = folder / FOLDER / harness
    plain = json.loads(json.dumps(settings, default=str))
    return [export(root, name, metrics["models"][name], answers, task, date, plain) for name, answers in rows.items()]


def _to_lm_eval(
    root: Path,
    name: str,
    metrics: Mapping[str, Any],
    rows: Sequence[Prediction],
    task: str,
    date: str,
    settings: dict[str, Any],
) -> Path:
    folder = root / _sanitize(name)
    result = {
        "alias": task,
        "sample_len": metrics["n"],
        f"{METRIC},none": metrics["accuracy"],
        f"{METRIC}_stderr,none": _standard_error(rows),
    }
    path = folder / f"results_{date}.json"
    write_json(
        path,
        {
            "results": {task: result},
            "group_subtasks": {task: []},
            "configs": {task: {"task": task, "output_type": "generate_until", "repeats": metrics["samples"]}},
            "versions": {task: 0},
            "n-shot": {task: 0},
            "higher_is_better": {task: {METRIC: True}},
            "n-samples": {task: {"original": metrics["n"], "effective": metrics["n"]}},
            "config": {
                "model": settings.get("engine"),
                "model_args": {"pretrained": metrics["model_path"]},
                "limit": settings.get("limit"),
                "gen_kwargs": {key: settings.get(key) for key in ("temperature", "top_p", "top_k", "max_new_tokens")},
                "random_seed": settings.get("seed"),
            },
            "model_source": "trl_reasoning_distill",
            "model_name": name,
            "model_name_sanitized": _sanitize(name),
            "system_instruction": settings.get("system_prompt"),
            "total_evaluation_time_seconds": str(metrics["seconds"]),
        },
    )
    write_jsonl(
        folder / f"samples_{task}_{date}.jsonl", (_lm_eval_sample(i, each) for i, each in enumerate(_by_problem(rows)))
    )
    return path


def _lm_eval_sample(index: int, answers: Sequence[Prediction]) -> dict[str, Any]:
    first = answers[0]
    doc = {"id": first.problem_id, "question": first.question, "answer": first.gold_answer}
    prompt, target = json.dumps(first.prompt, ensure_ascii=False), str(first.gold_answer)
    return {
        "doc_id": index,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
        "resps": [[row.completion for row in answers]],
        "filtered_resps": [row.extracted_answer or "" for row in answers],
        "filter": "none",
        "metrics": [METRIC],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(target),
        METRIC: _share(answers),
    }


def _to_lighteval(
    root: Path,
    name: str,
    metrics: Mapping[str, Any],
    rows: Sequence[Prediction],
    task: str,
    date: str,
    settings: dict[str, Any],
) -> Path:
    from datasets import Dataset

    full_task = f"{task}|0"
    result = {METRIC: metrics["accuracy"], f"{METRIC}_stderr": _standard_error(rows)}
    path = root / "results" / _sanitize(name) / f"results_{date}.json"
    write_json(
        path,
        {
            "config_general": {
                "model_config": {"model_name": metrics["model_path"]},
                "model_name": name,
                "max_samples": settings.get("limit"),
                "total_evaluation_time_secondes": str(metrics["seconds"]),
                "generation_parameters": {
                    key: settings.get(key) for key in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
                },
            },
            "results": {full_task: result, "all": result},
            "versions": {full_task: 0},
            "config_tasks": {
                full_task: {
                    "name": task,
                    "num_fewshots": 0,
                    "original_num_docs": metrics["n"],
                    "effective_num_docs": metrics["n"],
                }
            },
            "summary_tasks": {},
            "summary_general": {},
        },
    )
    details = Dataset.from_list([_lighteval_detail(i, each, full_task) for i, each in enumerate(_by_problem(rows))])
    file = root / "details" / _sanitize(name) / date / f"details_{task}|0_{date}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    details.to_parquet(str(file))
    return path


def _lighteval_detail(index: int, answers: Sequence[Prediction], task: str) -> dict[str, Any]:
    first = answers[0]
    return {
        "doc": {
            "query": first.question,
            "choices": [str(first.gold_answer)],
            "gold_index": 0,
            "task_name": task,
            "id": str(index),
            "specific": {"problem_id": first.problem_id},
        },
        "model_response": {
            "input": json.dumps(first.prompt, ensure_ascii=False),
            "text": [row.completion for row in answers],
            "text_post_processed": [row.extracted_answer or "" for row in answers],
        },
        "metric": {METRIC: _share(answers)},
    }


def _by_problem(rows: Sequence[Prediction]) -> list[list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for row in rows:
        found.setdefault(row.problem_id, []).append(row)
    return list(found.values())


def _share(answers: Sequence[Prediction]) -> float:
    return sum(row.status == "correct" for row in answers) / len(answers)


def _standard_error(rows: Sequence[Prediction]) -> float | None:
    """Standard error of the mean over problems, as both harnesses give it for a mean."""
    shares = [_share(answers) for answers in _by_problem(rows)]
    n, mean = len(shares), sum(shares) / len(shares)
    return math.sqrt(sum((share - mean) ** 2 for share in shares) / (n - 1) / n) if n > 1 else None


def _sanitize(name: str) -> str:
    """A model's name as lm-eval writes it in a path."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
