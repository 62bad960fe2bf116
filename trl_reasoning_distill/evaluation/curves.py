"""What was logged in a training, drawn over its steps."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_json
from trl_reasoning_distill.evaluation import charts
from trl_reasoning_distill.evaluation.scores import run_of

Paths = Mapping[str, "str | os.PathLike[str]"]

CURVES = {
    "eval_math_accuracy": "Accuracy on held-out problems during training",
    "sft_loss": "SFT loss, nats per token",
    "kd_loss": "KD loss, nats per token (× T²)",
    "kd_weight": "KD weight α",
    "kl_loss": "KL to the reference, nats per token",
    "kl_coef": "Coefficient of the KL to the reference",
    "top1_agreement": "Share of tokens where student and teacher agree",
    "loss": "Loss as a whole",
    "eval_loss": "Loss on held-out rows",
}
"""What is drawn of a training's `log_history`, where it was logged: key to title."""


def draw_curves(training: Paths, model_colors: Mapping[str, str]) -> list[dict[str, str]]:
    """The charts of what was logged in the trainings, each with its title."""
    histories = {name: read_log_history(Path(path)) for name, path in training.items()}
    others = (color for color in charts.SERIES if color not in model_colors.values())
    colors = {name: model_colors.get(run_of(name)[0]) or next(others, charts.INK) for name in histories}
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


def read_log_history(folder: Path) -> list[dict[str, Any]]:
    """`log_history` of a training's `trainer_state.json`, of its newest checkpoint if it has not ended."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    for candidate in (folder, *reversed(checkpoints)):
        if (candidate / "trainer_state.json").is_file():
            history: list[dict[str, Any]] = read_json(candidate / "trainer_state.json")["log_history"]
            return history
    raise FileNotFoundError(f"No trainer_state.json in {folder} or in a checkpoint of it: is it a training's output?")
