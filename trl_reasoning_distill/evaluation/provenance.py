"""Where a result comes from: the stages behind it, what they cost, and the Top-K store that was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_json
from trl_reasoning_distill.data.manifest import StageManifest, read_manifest

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
    """What each stage took: wall time, its share of the whole, tokens, and money where the stage was told prices."""
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
