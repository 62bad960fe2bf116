"""Runs a recipe's own YAMLs with real launches, made small: other models, other data, fewer steps."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_jsonl, write_json
from trl_reasoning_distill.scripts.stage import read_config

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 256,
    "bf16": False,
    "dtype": "float32",
    "gradient_checkpointing": False,
}
"""What makes a training of any recipe small enough for a CPU."""


@dataclasses.dataclass(frozen=True)
class FinishedRecipe:
    """A recipe that was run.

    Attributes:
        runs: The folder of its stages.
        output: What was printed.
        run_again: Runs it once more and returns what is printed.
    """

    runs: Path
    output: str
    run_again: Callable[[], str]

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file of a stage, such as `"verify/train.jsonl"`."""
        return list(read_jsonl(self.runs / file))


def run_recipe(
    recipe: Path, folder: Path, overrides: Mapping[str, Mapping[str, Any]], *, timeout: float = 1500
) -> FinishedRecipe:
    """Copy a recipe, change some options, and run all its stages on the CPU, each in its own process.

    Args:
        recipe: Its folder.
        folder: Where to run it; the paths of its YAMLs are relative to it.
        overrides: Stage to the options that differ; a `None` takes the option out.
        timeout: Seconds for the whole.
    """
    copy = folder / "recipes" / recipe.name
    shutil.copytree(recipe, copy)
    stages = {path.stem for path in copy.glob("*.yaml")}
    assert overrides.keys() <= stages, f"{recipe.name} has no {sorted(overrides.keys() - stages)}"
    for stage, changes in overrides.items():
        path = copy / f"{stage}.yaml"
        options = read_config(path) | changes
        write_json(path, {key: value for key, value in options.items() if value is not None})  # JSON is YAML

    def run() -> str:
        command = [sys.executable, "-m", "trl_reasoning_distill.cli", "run", f"recipes/{recipe.name}"]
        command += ["--accelerate_config", "cpu"]
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | os.environ
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return FinishedRecipe(folder / "runs" / recipe.name, run(), run)
