"""The folder of a whole run, as `trl-distill run` leaves it: which of its folders holds what."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_json, read_jsonl
from trl_reasoning_distill.data.manifest import WHERE_AND_HOW, StageManifest, read_manifest
from trl_reasoning_distill.data.schema import Prediction

PREDICTIONS_NAME = "predictions.jsonl"
METRICS_NAME = "metrics.json"

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


def read_predictions(folder: str | os.PathLike[str]) -> list[Prediction]:
    """What the evaluate stage wrote into a folder.

    Raises:
        FileNotFoundError: If there are no predictions in it.
        ValueError: For a row that is none, with its number.
    """
    path = Path(folder) / PREDICTIONS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"No {PREDICTIONS_NAME} in {folder}: give the folder that the evaluate stage wrote.")
    return [Prediction.from_row(row, f"{path}, row {number}") for number, row in enumerate(read_jsonl(path), start=1)]


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


_COVERAGE = ("kept_positions", "positions")


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


def cost(stages: Sequence[StageManifest]) -> list[dict[str, Any]]:
    """What each stage took: wall time, its share of the whole, tokens, and money where the stage was given prices."""
    whole = sum(stage.wall_seconds for stage in stages)
    return [
        {
            "name": Path(stage.config.get("output_dir") or stage.stage).name,
            "stage": stage.stage,
            "seconds": stage.wall_seconds,
            "share": stage.wall_seconds / whole if whole else 0.0,
            "tokens": sum(stage.counts.get(name, 0) for name in _token_counts(stage)),
            "money": stage.counts.get("cost"),
        }
        for stage in stages
    ]


def summarize_store(path: Path) -> dict[str, Any]:
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
        "coverage": _coverage(counts),
        "counts": counts,
        "fingerprint": manifest.get("fingerprint") or {},
    }


def _coverage(counts: dict[str, Any]) -> float | None:
    """Share of the supervised positions that still have a target after an alignment; `None` for a store that had none."""
    kept, positions = (counts.get(name) for name in _COVERAGE)
    return kept / positions if kept is not None and positions else None


def _token_counts(stage: StageManifest) -> list[str]:
    """Names of the counts that are tokens: read and written by a teacher, trained on, or written in an evaluation."""
    if stage.stage == "capture":
        return ["positions"]
    named: list[str] = [name for name in ("tokens", "prompt_tokens") if name in stage.counts]
    return named or [name for name in stage.counts if name.endswith("_tokens") and not name.startswith("supervised")]
