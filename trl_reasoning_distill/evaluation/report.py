"""One page with what was found, how sure that is, and what it came from: `report.html`, `report.md`, `comparison.json`; and
`model_card.md`, the section for the model's card.

`report.html` is one file. It asks nothing of the network (its Content-Security-Policy forbids that), runs no script, and shows
all that a model wrote as text, whatever it wrote.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import atomic_write, read_json, write_json
from trl_reasoning_distill.data.manifest import StageManifest
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation import charts, findings
from trl_reasoning_distill.evaluation.charts import Paths, draw_curves
from trl_reasoning_distill.evaluation.compare import (
    BASE,
    CONTROL,
    STUDENT,
    TEACHER,
    Comparison,
    Part,
    compare_models,
)
from trl_reasoning_distill.evaluation.errors import ERROR_KINDS, classify_error
from trl_reasoning_distill.evaluation.runs import (
    METRICS_NAME,
    cost,
    read_predictions,
    summarize_store,
    trace_provenance,
)
from trl_reasoning_distill.evaluation.scores import run_of


def write_page(path: Path, template: str, page: Mapping[str, Any]) -> None:
    """Fill in a template of this package, by its name as HTML or as Markdown, every value escaped for that."""
    import jinja2
    from markupsafe import Markup

    is_html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trl_reasoning_distill", "evaluation/templates"),
        autoescape=is_html,
        finalize=_html if is_html else _markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": findings.percent,
        "points": findings.points,
        "interval": findings.percent_interval,
        "p_value": findings.p_value,
        "describe": findings.describe_pair,
        "outcome": findings.outcome_of,
        "size": _size,
        "duration": _duration,
        "svg": Markup,  # only ever used for our own charts
    }
    with atomic_write(path) as handle:
        handle.write(environment.get_template(template).render(page))


def _printable(prediction: Prediction) -> Prediction:
    texts: dict[str, Any] = {
        name: findings.printable(text) for name, text in vars(prediction).items() if isinstance(text, str)
    }
    return dataclasses.replace(prediction, **texts)


def _html(value: Any) -> Any:
    """A text whose percent signs stay beside their numbers."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value  # our charts are Markup, not str


def _markdown(value: Any) -> Any:
    """A text in which nothing is Markdown or HTML, on one line."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(value.split()))


def _size(count: float) -> str:
    """`2345678` bytes as `2.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    """`4000` seconds as `1 h 7 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


DIMENSIONS = {
    "kind": "kind of problem",
    "length": "length of the question",
    "steps": "steps of the reference solution",
}
"""What the problems are parted by, in words."""

CARD_SETTINGS = (
    "kd_top_k",
    "top_k",  # its name in runs of 0.1.0
    "kd_temperature",
    "kd_weight",
    "kd_support",
    "kd_divergence",
    "kd_top_p",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
"""Options of the distillation that the model card names."""

MAX_OUTPUT = 8_000  # characters of a model's text that an example shows
MAX_PARTS = 24  # parts of the problems that a chart shows: the largest ones


def write_report(
    evaluation_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    training: Paths | None = None,
    store: str | os.PathLike[str] | None = None,
    title: str = "Reasoning distillation",
    base: str = BASE,
    teacher: str = TEACHER,
    control: str = CONTROL,
    student: str = STUDENT,
    examples: int = 4,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the models of an evaluation and write `report.html`, `report.md`, `model_card.md` and `comparison.json`.

    Args:
        evaluation_dir: Folder that the evaluate stage wrote, with `predictions.jsonl`.
        output_dir: Folder for the four files; made if missing.
        training: Name of a training to its output folder, for its curves. A training that has the name of a model is drawn in
            that model's colour.
        store: Top-K store that the student was trained on.
        title: Heading of the page.
        base: Name of the model that training started from.
        teacher: Name of the teacher.
        control: Name of the model trained on the text alone.
        student: Name of the distilled model.
        examples: Problems to show for each outcome (fixed, broken, both right, both wrong), drawn at random.
        resamples: Bootstrap resamples per interval.
        seed: Of the resampling and of the choice of examples.

    Returns:
        What `comparison.json` holds.

    Raises:
        MissingExtraError: If matplotlib or Jinja2 is not installed.
        FileNotFoundError: If a folder lacks what it should hold.
        ValueError: If the predictions cannot be compared; see `compare_models`.
    """
    evaluation_dir, output_dir = Path(evaluation_dir), Path(output_dir)
    predictions = [_printable(prediction) for prediction in read_predictions(evaluation_dir)]
    comparison = compare_models(
        predictions, base=base, teacher=teacher, control=control, student=student, resamples=resamples, seed=seed
    )
    place = list(comparison.models)
    # From here on all runs of a model are one, and in the order of every table
    predictions = [dataclasses.replace(each, model=run_of(each.model)[0]) for each in predictions]
    predictions.sort(key=lambda each: place.index(each.model))
    colors = model_colors(comparison)
    stages = trace_provenance([evaluation_dir, *(training or {}).values(), *([store] if store else [])])
    page = {
        "title": findings.printable(title),
        "comparison": comparison,
        "finding": findings.find(comparison),
        "charts": _charts(comparison, colors),
        "dimensions": DIMENSIONS,
        "behaviour": _behaviour(predictions),
        "metrics": _metrics(evaluation_dir / METRICS_NAME, comparison),
        "errors": _errors(predictions),
        "curves": draw_curves(training or {}, colors),
        "store": summarize_store(Path(store)) if store else None,
        "examples": _examples(predictions, comparison, examples, seed),
        "stages": stages,
        "cost": cost(stages),
        "settings": _student_settings(stages),
    }
    write_json(output_dir / "comparison.json", comparison.to_dict())
    for name in ("model_card.md", "report.md", "report.html"):
        write_page(output_dir / name, f"{name}.j2", page)
    return comparison


def model_colors(comparison: Comparison) -> dict[str, str]:
    """A colour per model: those of base, control, student and teacher are always the same."""
    role_colors = dict(zip((BASE, CONTROL, STUDENT, TEACHER), charts.SERIES, strict=False))
    colors = {name: role_colors[role] for role, name in comparison.roles.items()}
    others = [name for name in comparison.models if name not in colors]
    free = [color for color in charts.SERIES if color not in colors.values()]
    return colors | {name: free[index % len(free)] for index, name in enumerate(others)}


def _charts(comparison: Comparison, colors: Mapping[str, str]) -> dict[str, str]:
    drawn = {"accuracy": charts.accuracy_chart(comparison.models, colors)}
    pair = comparison.headline
    if pair is None:
        return drawn
    drawn["differences"] = charts.difference_chart(comparison.paired)
    names = (pair.second, pair.first)
    drawn |= {
        f"by_{dimension}": charts.kind_chart(_pair_by_part(parts, names), names, colors, dimension)
        for dimension, parts in comparison.breakdowns.items()
    }
    return drawn


def _pair_by_part(parts: Mapping[str, Part], names: tuple[str, str]) -> dict[str, tuple[float, float]]:
    """Accuracies of two models on the parts with the most problems."""
    largest = sorted(parts, key=lambda label: -parts[label].models[names[0]].n)[:MAX_PARTS]
    return {
        label or "(none)": (part.models[names[0]].accuracy, part.models[names[1]].accuracy)
        for label, part in parts.items()
        if label in largest
    }


def _student_settings(stages: Sequence[StageManifest]) -> dict[str, Any]:
    """The options of the distillation that a reader of a model card asks for first."""
    distilled = [stage for stage in stages if stage.stage in ("distill", "gkd")]
    return {name: value for name, value in distilled[-1].config.items() if name in CARD_SETTINGS} if distilled else {}


def _behaviour(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Per model: tokens and seconds per answer, and the share of truncated answers."""
    answers_of: dict[str, list[Prediction]] = {}
    for each in predictions:
        answers_of.setdefault(each.model, []).append(each)
    return {
        model: {
            "tokens": statistics.fmean(each.num_tokens for each in answers),
            "seconds": statistics.fmean(each.seconds for each in answers),
            "truncated": statistics.fmean(each.finish_reason == "length" for each in answers),
        }
        for model, answers in answers_of.items()
    }


def _metrics(path: Path, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """What the evaluation measured beside right and wrong, of the first run of each model; empty without its `metrics.json`."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, metrics in read_json(path)["models"].items():
        found.setdefault(run_of(findings.printable(name))[0], metrics)
    return {name: found[name] for name in comparison.models if name in found}


def _errors(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Counts of the kinds of errors that occur, per model, and their chart."""
    counts: dict[str, Counter[str]] = {}
    for each in predictions:
        counts.setdefault(each.model, Counter())[classify_error(each)] += 1
    wrong = [kind for kind in ERROR_KINDS if kind != "correct"]
    colors = {
        kind: color
        for kind, color in zip(wrong, charts.ERRORS, strict=True)
        if any(by_kind[kind] for by_kind in counts.values())
    }
    shares = {model: {kind: by_kind[kind] / by_kind.total() for kind in colors} for model, by_kind in counts.items()}
    return {"kinds": list(colors), "counts": counts, "chart": charts.error_chart(shares, colors) if colors else None}


def _examples(predictions: Sequence[Prediction], comparison: Comparison, count: int, seed: int) -> list[dict[str, Any]]:
    """Problems by outcome of the headline pair, drawn at random: what was fixed, what broke, and what did not change."""
    answers: dict[str, dict[str, Prediction]] = {}
    for each in predictions:
        answers.setdefault(each.problem_id, {}).setdefault(each.model, each)  # the first of several samples
    pair = comparison.headline
    first = pair.first if pair else next(iter(comparison.models))
    second = pair.second if pair else first
    groups: dict[tuple[bool, bool], list[str]] = {}
    for problem, by_model in answers.items():
        outcome = (by_model[first].status == "correct", by_model[second].status == "correct")
        groups.setdefault(outcome, []).append(problem)
    titles = {
        (True, False): f"Fixed: {first} is right, {second} is not",
        (False, True): f"Broken: {second} is right, {first} is not",
        (True, True): "Both are right" if pair else "Right",
        (False, False): "Neither is right" if pair else "Wrong",
    }
    shown = []
    for outcome, title in titles.items():
        problems = groups.get(outcome, [])
        drawn = random.Random(seed).sample(problems, min(count, len(problems)))
        shown.append(
            {"title": title, "count": len(problems), "problems": [_example(answers[problem]) for problem in drawn]}
        )
    return [group for group in shown if group["problems"]]


def _example(by_model: Mapping[str, Prediction]) -> dict[str, Any]:
    first = next(iter(by_model.values()))
    return {
        "id": first.problem_id,
        "kind": first.kind,
        "question": first.question,
        "gold_answer": first.gold_answer,
        "answers": [
            {
                "model": model,
                "error": classify_error(each),
                "reason": each.reason,
                "extracted_answer": each.extracted_answer,
                "tokens": each.num_tokens,
                "completion": each.completion[:MAX_OUTPUT],
                "left_out": max(0, len(each.completion) - MAX_OUTPUT),
            }
            for model, each in by_model.items()
        ],
    }
