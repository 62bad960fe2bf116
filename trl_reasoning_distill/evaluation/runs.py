"""The folder of a whole run, as `trl-distill run` leaves it: which of its folders holds what."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.manifest import WHERE_AND_HOW, StageManifest, read_manifest

_TRAININGS = ("sft", "distill", "gkd")
_STORES = ("align", "capture")  # the aligned store is the one that was trained on
_NOT_SETTINGS = {"output_dir", "hub_model_id", "run_name", "logging_dir", "title", "models"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: Its folder's name.
        evaluation: Folder with `predictions.jsonl`.
        training: Name of a model to the folder of its training.
        store: The Top-K store that was trained on, if there is one.
        stages: Manifest of each finished stage by the name of its folder.
    """

    name: str
    evaluation: Path
    training: dict[str, Path]
    store: Path | None
    stages: dict[str, StageManifest]

    @property
    def settings(self) -> dict[str, Any]:
        """All options of all stages but the report, as `stage.option`, without inputs, and without where and how it was run."""
        return {
            f"{name}.{option}": value
            for name, stage in self.stages.items()
            if stage.stage != "report"
            for option, value in stage.config.items()
            if option not in WHERE_AND_HOW | _NOT_SETTINGS and option not in stage.inputs
        }

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.wall_seconds for stage in self.stages.values())


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Look into the folder of a run.

    Raises:
        FileNotFoundError: If no stage in it evaluated models, or the folder is not there.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"No folder {path}: give the folder of a run, such as runs/quickstart.")
    stages: dict[str, StageManifest] = {}
    for child in sorted(path.iterdir()):
        if child.is_dir() and (child / "manifest.json").is_file():
            stages[child.name] = read_manifest(child)
    evaluations = [path / name for name, stage in stages.items() if stage.stage == "evaluate"]
    if not evaluations:
        raise FileNotFoundError(
            f"No finished evaluate stage in {path}: run it first, or give --evaluation FOLDER instead."
        )
    stores = [path / name / "store" for kind in _STORES for name, stage in stages.items() if stage.stage == kind]
    return Run(
        name=path.resolve().name,
        evaluation=evaluations[-1],
        training=_trainings(path, stages, stages[evaluations[-1].name]),
        store=next((store for store in stores if (store / "manifest.json").is_file()), None),
        stages=stages,
    )


def _trainings(run: Path, stages: dict[str, StageManifest], evaluation: StageManifest) -> dict[str, Path]:
    """Trainings by the name under which their model was evaluated, else by their folder's."""
    evaluated = {
        Path(each["path"]).resolve().parent: name.removeprefix("models.")
        for name, each in evaluation.inputs.items()
        if name.startswith("models.") and each["path"]
    }
    folders = [run / name for name, stage in stages.items() if stage.stage in _TRAININGS]
    return {
        evaluated.get(folder.resolve(), folder.name): folder
        for folder in folders
        if (folder / "trainer_state.json").is_file()
    }
