"""One page that says what was found, how sure that is, and what it came from: `report.html`, `report.md`, `comparison.json`.

`report.html` is one file. It asks nothing of the network (its Content-Security-Policy forbids that), runs no script, and shows
all that a model wrote as text, whatever it wrote.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import atomic_write, read_json, read_jsonl, write_json
from trl_reasoning_distill.data.manifest import StageManifest, read_manifest
from trl_reasoning_distill.evaluation import charts, findings
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
from trl_reasoning_distill.extras import require_extra

CURVES = {
    "sft_loss": "SFT loss, nats per token",
    "kd_loss": "KD loss, nats per token (× T²)",
    "kd_weight": "KD weight α",
    "kl_loss": "KL to the reference, nats per token",
    "top1_agreement": "Share of tokens where student and teacher agree",
    "eval_accuracy": "Accuracy during training",
    "loss": "Loss as a whole",
}
"""What is drawn of a training's `log_history`, where it was logged: key to title."""

DIMENSIONS = {
    "kind": "kind of problem",
    "length": "length of the question",
    "steps": "steps of the reference solution",
}
"""What the problems are parted by, in words."""

MAX_OUTPUT = 8_000  # characters of a model's text that an example shows
MAX_PARTS = 24  # parts of the problems that a chart shows: the largest ones

Paths = Mapping[str, "str | os.PathLike[str]"]


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
    """Compare the models of an evaluation and write `report.html`, `report.md` and `comparison.json`.

    Args:
        evaluation_dir: Folder that the evaluate stage wrote, with `predictions.jsonl`.
        output_dir: Folder for the three files; made if missing.
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
        What stands in `comparison.json`.

    Raises:
        MissingExtraError: If matplotlib or Jinja2 is not installed.
        FileNotFoundError: If a folder lacks what it should hold.
        ValueError: If the predictions cannot be compared; see `compare_models`.
    """
    for module in ("jinja2", "matplotlib"):  # before the work, not after it
        require_extra("report", module)
    evaluation_dir, output_dir = Path(evaluation_dir), Path(output_dir)
    predictions_path = evaluation_dir / "predictions.jsonl"
    if not predictions_path.is_file():
        raise FileNotFoundError(
            f"No predictions.jsonl in {evaluation_dir}: give the folder that the evaluate stage wrote."
        )
    predictions = [{key: _printable(value) for key, value in row.items()} for row in read_jsonl(predictions_path)]
    comparison = compare_models(
        predictions, base=base, teacher=teacher, control=control, student=student, resamples=resamples, seed=seed
    )
    place = list(comparison.models)
    predictions.sort(key=lambda row: place.index(row["model"]))  # so that every table has the same order
    colors = _model_colors(comparison)
    for row in predictions:
        row["error"] = classify_error(row)
    page = {
        "title": _printable(title),
        "comparison": comparison,
        "finding": findings.find(comparison),
        "charts": _charts(comparison, colors),
        "dimensions": DIMENSIONS,
        "behaviour": _behaviour(predictions),
        "errors": _errors(predictions),
        "curves": _curves(training or {}, colors),
        "store": _store(Path(store)) if store else None,
        "examples": _examples(predictions, comparison, examples, seed),
        "stages": trace_provenance([evaluation_dir, *(training or {}).values(), *([store] if store else [])]),
    }
    html, markdown = _render(page)
    write_json(output_dir / "comparison.json", comparison.to_dict())
    for name, text in (("report.md", markdown), ("report.html", html)):
        with atomic_write(output_dir / name) as handle:
            handle.write(text)
    return comparison


def trace_provenance(paths: Iterable[str | os.PathLike[str]]) -> list[StageManifest]:
    """The manifests of the stages that made some folders, and of those that made what these read, oldest first."""
    found: dict[Path, StageManifest] = {}
    waiting = [Path(path) for path in paths]
    while waiting:
        path = waiting.pop()
        for folder in (path, *list(path.parents)[:2]):  # a stage's files lie in its folder or one below
            if folder in found:
                break
            try:
                found[folder] = read_manifest(folder)
            except (FileNotFoundError, ValueError):  # not a stage's folder; a store has a manifest of its own kind
                continue
            waiting += [Path(each["path"]) for each in found[folder].inputs.values() if each["path"]]
            break
    stages = list(found.values())[::-1]  # what was read was found after its reader, and `started` counts whole seconds
    return sorted(stages, key=lambda stage: stage.started)


def _model_colors(comparison: Comparison) -> dict[str, str]:
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


def _behaviour(predictions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Per model: tokens and seconds per answer, and the share of truncated answers."""
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        rows_of.setdefault(row["model"], []).append(row)
    return {
        model: {
            "tokens": _mean(row.get("num_tokens") for row in rows),
            "seconds": _mean(row.get("seconds") for row in rows),
            "truncated": _mean(float(row.get("finish_reason") == "length") for row in rows),
        }
        for model, rows in rows_of.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _errors(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of the kinds of errors that occur, per model, and their chart."""
    counts: dict[str, Counter[str]] = {}
    for row in predictions:
        counts.setdefault(row["model"], Counter())[row["error"]] += 1
    wrong = [kind for kind in ERROR_KINDS if kind != "correct"]
    colors = {
        kind: color
        for kind, color in zip(wrong, charts.ERRORS, strict=True)
        if any(by_kind[kind] for by_kind in counts.values())
    }
    shares = {model: {kind: by_kind[kind] / by_kind.total() for kind in colors} for model, by_kind in counts.items()}
    return {"kinds": list(colors), "counts": counts, "chart": charts.error_chart(shares, colors) if colors else None}


def _curves(training: Paths, model_colors: Mapping[str, str]) -> list[dict[str, str]]:
    """The charts of what was logged in the trainings, each with its title."""
    histories = {name: _read_log_history(Path(path)) for name, path in training.items()}
    others = (color for color in charts.SERIES if color not in model_colors.values())
    colors = {name: model_colors.get(name) or next(others, charts.INK) for name in histories}
    drawn = []
    for key, title in CURVES.items():
        curves = {}
        for name, history in histories.items():
            logged = [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]
            if logged:
                curves[name] = ([step for step, _ in logged], [value for _, value in logged])
        if curves:
            drawn.append({"title": title, "chart": charts.curve_chart(title, curves, colors)})
    return drawn


def _read_log_history(folder: Path) -> list[dict[str, Any]]:
    """`log_history` of a training's `trainer_state.json`, of its newest checkpoint if it has not ended."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    for candidate in (folder, *reversed(checkpoints)):
        if (candidate / "trainer_state.json").is_file():
            history: list[dict[str, Any]] = read_json(candidate / "trainer_state.json")["log_history"]
            return history
    raise FileNotFoundError(f"No trainer_state.json in {folder} or in a checkpoint of it: is it a training's output?")


def _store(path: Path) -> dict[str, Any]:
    """What a store holds and what it takes, from its manifest, and what the stage that made it counted."""
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or not manifest.get("positions"):
        raise ValueError(f"{path} is not a Top-K store with positions in it: its manifest.json names none.")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        counts = read_manifest(path.parent).counts
    except (FileNotFoundError, ValueError):  # a store that no stage of ours put there
        counts = {}
    return {
        "path": str(path),
        "positions": manifest["positions"],
        "rows": manifest.get("rows"),
        "top_k": manifest.get("top_k"),
        "temperatures": manifest.get("temperatures"),
        "bytes": size,
        "bytes_per_position": size / manifest["positions"],
        "counts": counts,
        "fingerprint": manifest.get("fingerprint") or {},
    }


def _examples(
    predictions: Sequence[Mapping[str, Any]], comparison: Comparison, count: int, seed: int
) -> list[dict[str, Any]]:
    """Problems by outcome of the headline pair, drawn at random: what was fixed, what broke, and what did not change."""
    answers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in predictions:
        answers.setdefault(row["problem_id"], {}).setdefault(row["model"], row)  # the first of several samples
    pair = comparison.headline
    first = pair.first if pair else next(iter(comparison.models))
    second = pair.second if pair else first
    groups: dict[tuple[bool, bool], list[str]] = {}
    for problem, by_model in answers.items():
        outcome = (by_model[first]["status"] == "correct", by_model[second]["status"] == "correct")
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


def _example(by_model: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    row = next(iter(by_model.values()))
    return {
        "id": row["problem_id"],
        "kind": row.get("kind"),
        "question": row.get("question", ""),
        "gold": row.get("gold"),
        "answers": [
            {
                "model": model,
                "error": answer["error"],
                "reason": answer.get("reason"),
                "answer": answer.get("answer"),
                "tokens": answer.get("num_tokens"),
                "text": answer["output"][:MAX_OUTPUT],
                "left_out": max(0, len(answer["output"]) - MAX_OUTPUT),
            }
            for model, answer in by_model.items()
        ],
    }


def _render(page: Mapping[str, Any]) -> tuple[str, str]:
    """The page as HTML, every value escaped, and as Markdown, likewise."""
    jinja2 = require_extra("report", "jinja2")
    markup = require_extra("report", "markupsafe").Markup
    filters = {
        "percent": findings.percent,
        "points": findings.points,
        "interval": findings.percent_interval,
        "p_value": findings.p_value,
        "describe": findings.describe_pair,
        "outcome": findings.outcome_of,
        "size": _size,
        "duration": _duration,
        "svg": markup,  # only ever used for our own charts
    }
    texts = []
    for name, finalize in (("report.html.j2", _html), ("report.md.j2", _markdown)):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("trl_reasoning_distill", "evaluation/templates"),
            autoescape=name.endswith(".html.j2"),
            finalize=finalize,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= filters
        texts.append(environment.get_template(name).render(page))
    return texts[0], texts[1]


def _printable(value: Any) -> Any:
    """A text without the characters that no file or page can hold: control characters and halves of surrogate pairs."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", value)


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
