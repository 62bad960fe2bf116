"""Runs a recipe's own YAMLs, made small: other models, other data, fewer steps."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill import launch, pipeline
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.data.files import read_jsonl, write_json

Overrides = Mapping[str, Mapping[str, Any]]

TRAININGS = ("sft", "distill", "gkd")

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
    """

    runs: Path
    output: str

    @property
    def folder(self) -> Path:
        """Where it was run."""
        return self.runs.parent.parent

    def rows(self, file: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file of a stage, such as `"verify/train.jsonl"`."""
        return list(read_jsonl(self.runs / file))


def copy_recipe(recipe: Path, folder: Path, overrides: Overrides) -> Path:
    """Copy a recipe to `folder/recipes` and change some of its stages' options; a `None` takes the option out."""
    copy = folder / "recipes" / recipe.name
    shutil.copytree(recipe, copy)
    stages = {path.stem for path in copy.glob("*.yaml")}
    assert overrides.keys() <= stages, f"{recipe.name} has no {sorted(overrides.keys() - stages)}"
    for stage, changes in overrides.items():
        path = copy / f"{stage}.yaml"
        options = read_config(path) | changes
        write_json(path, {key: value for key, value in options.items() if value is not None})  # JSON is YAML
    return copy


def run_as_a_user(copy: Path, *, timeout: float = 1500) -> FinishedRecipe:
    """`trl-distill run` on the CPU: each stage launched in processes of its own."""
    folder = copy.parent.parent
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", "run", f"recipes/{copy.name}"]
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | os.environ
    done = subprocess.run(
        [*command, "--accelerate_config", "cpu"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRecipe(folder / "runs" / copy.name, done.stdout)


def run_in_process(copy: Path) -> FinishedRecipe:
    """The same, but only the first training is launched; other stages' `main`s are called here. Most of a launch is imports."""
    launched: list[str] = []

    def run(command: Sequence[str]) -> int:
        script, *words = command[command.index("trl_reasoning_distill.scripts") + 1 :]
        if script in TRAININGS and not launched:
            launched.append(script)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(done.stdout, done.stderr if done.returncode else "")
            return done.returncode
        launch.run_in_process(script, words)  # raises SystemExit where a process would have failed
        return 0

    output = io.StringIO()
    folder = copy.parent.parent
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        patch.setattr(launch, "run_command", run)
        patch.setenv("ACCELERATE_USE_CPU", "true")  # as accelerate_configs/cpu.yaml has it
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipeline.main([f"recipes/{copy.name}", "--accelerate_config", "cpu"])
    assert launched, "a recipe trains something"
    return FinishedRecipe(folder / "runs" / copy.name, output.getvalue())


WAYS = [
    pytest.param(run_in_process, id="training_launched"),
    pytest.param(run_as_a_user, id="all_launched", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]
"""How each recipe is run: by default in half of the time; all launches are real in `make test-slow`, and always in the quickstart."""
