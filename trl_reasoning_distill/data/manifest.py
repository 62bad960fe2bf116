"""What made this folder? A manifest per stage, written last, so that a killed stage never looks finished.

    with StageRun("verify", output_dir, config=dataclasses.asdict(args), inputs={"traces": args.traces}) as run:
        if run.is_finished:
            return
        ...                                          # resumes from whatever an unfinished run of the same config left
        run.finish(counts={"correct": 90}, result="90 of 100 traces are right")

While the stage runs, `run.json` holds the fingerprint of its configuration and inputs; when it ends, `manifest.json` takes its
place. A folder that holds another configuration's run is refused: half of one run and half of another is nobody's result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from trl_reasoning_distill import folders
from trl_reasoning_distill.data.files import explain_full_disk, hash_path, read_json, remove_torn, write_json

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"

VERSIONED_PACKAGES = (
    "trl-reasoning-distill",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "math-verify",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
)

# Options that say where and how a stage runs, not what it makes: two runs that differ only here make the same result.
WHERE_AND_HOW = frozenset(
    {
        "output_dir",
        "logging_dir",
        "dry_run",
        "overwrite",
        "local_rank",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
    }
    | {"resume_from_checkpoint", "allow_changed_resume", "push_to_hub"}
    # A generation that ran out of memory or overran its server may go on with smaller batches.
    | {"device", "device_map", "max_batch_size", "max_batch_tokens", "gpu_memory_utilization", "tensor_parallel_size"}
    | {"batching", "input_price", "output_price"}
    | {"concurrency", "request_timeout", "max_retries", "api_key_env", "base_url"}
)
_OF_A_RUN = {"stage", "fingerprint", "config", "inputs"}
_SECRETS = frozenset({"api_key", "hub_token", "push_to_hub_token"})


@dataclasses.dataclass(frozen=True)
class StageManifest:
    """What a finished stage leaves beside its files.

    Attributes:
        stage: Name of the stage, such as `"verify"`.
        status: Always `"finished"`: an unfinished stage has no manifest.
        config: The stage's options.
        inputs: Name to `{"path": …, "hash": …}`; the hash is null for what is not on this disk, such as a hub id.
        counts: Name to number, whatever the stage counts.
        result: One line for a reader.
        versions: Installed versions of the packages that decide a result, and of Python.
        git: `{"commit": …, "dirty": …}` of the checkout the stage was started in; null outside of one.
        seed: The seed, if the stage has one.
        started: When, UTC, ISO 8601.
        wall_seconds: How long, without the launch; of the last go, if the stage was resumed.
        command: The command line.
        fingerprint: Hash over stage, config and inputs: equal fingerprints, equal work.
        outputs: The files that it made, relative to its folder; `None` in a manifest of 0.1.0.
    """

    stage: str
    status: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str | None]]
    counts: dict[str, int | float]
    result: str
    versions: dict[str, str]
    git: dict[str, Any] | None
    seed: int | None
    started: str
    wall_seconds: float
    command: str
    fingerprint: str
    outputs: list[str] | None = None


def read_manifest(directory: str | os.PathLike[str]) -> StageManifest:
    """Read the manifest of a finished stage.

    Raises:
        FileNotFoundError: If the folder has none: the stage has not finished, or is another kind of folder.
        ValueError: If it is not a manifest.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        state = "has not finished" if (Path(directory) / RUN_NAME).is_file() else "holds no stage's result"
        raise FileNotFoundError(
            f"No {MANIFEST_NAME} in {directory}: this folder {state}. Run the stage that makes it first."
        )
    values = read_json(path)
    fields = dataclasses.fields(StageManifest)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(values, dict) or not needed <= values.keys():
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} is not a stage's manifest: expected the keys {sorted(needed)}, found {found}.")
    return StageManifest(**{field.name: values[field.name] for field in fields if field.name in values})


class StageRun:
    """One run of a stage: checks the output folder on enter, writes the manifest on `finish`.

    Under several processes every rank makes one; only the rank with `is_main` writes, and holds the folder as its one writer.
    Synchronise the ranks after entering, because the main rank may first clear the folder.

    Args:
        stage: Name of the stage.
        output_dir: Its folder; made if missing.
        config: The stage's options, JSON-like. Those of `WHERE_AND_HOW`, and those that carry the name of an input, are left out
            of the fingerprint: an input counts by its content, wherever it lies.
        inputs: Name to the file or folder that the stage reads, or to a hub id (which has no hash).
        seed: The stage's seed, for the manifest.
        overwrite: First remove the files that an earlier run has left here, whatever stage it was; nothing else.
        is_main: False on all ranks but the first.

    Attributes:
        is_finished: True if the folder already holds the finished result of this configuration and these inputs.
        is_resumed: True if the folder holds an unfinished run of this configuration and these inputs (to be asked on the main rank).
    """

    def __init__(
        self,
        stage: str,
        output_dir: str | os.PathLike[str],
        config: Mapping[str, Any],
        inputs: Mapping[str, str | os.PathLike[str]] | None = None,
        seed: int | None = None,
        *,
        overwrite: bool = False,
        is_main: bool = True,
    ) -> None:
        self.stage = stage
        self.output_dir = Path(output_dir)
        self.config: dict[str, Any] = _to_json(config)
        self.inputs = {name: describe_input(path) for name, path in (inputs or {}).items()}
        self.seed = seed
        self.overwrite = overwrite
        self.is_main = is_main
        self.fingerprint = _fingerprint(self.stage, self.config, self.inputs)
        self.is_finished = False
        self.is_resumed = False
        self._found: list[str] = []  # what was in the folder before the run

    def __enter__(self) -> StageRun:
        self._clock = time.perf_counter()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.ExitStack() as stack:
            stack.push(self._explain)
            folders.check_apart(self.output_dir, {name: value["path"] for name, value in self.inputs.items()})
            if self.is_main:
                stack.enter_context(folders.one_writer(self.output_dir))
            # Other ranks need not look where the main one clears the folder meanwhile
            found = self._find_earlier_run() if self.is_main or not self.overwrite else None
            if found is not None and not self.overwrite:
                name, earlier = found
                if earlier.get("fingerprint") != self.fingerprint:
                    raise ValueError(self._describe_conflict(name, earlier))
                self.is_finished = name == MANIFEST_NAME
                self.is_resumed = name == RUN_NAME
            if self.is_main:
                self._open_folder(found)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of the folder. A run that did not call `finish` stays unfinished, and resumes."""
        self._stack.__exit__(kind, error, traceback)

    def _explain(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """A full disk is said to be one."""
        if error is not None and (full := explain_full_disk(error, self.output_dir)):
            raise full from error

    def finish(self, counts: Mapping[str, int | float], result: str) -> None:
        """Write `manifest.json`, last of all files. Does nothing on ranks that are not main.

        Args:
            counts: Name to number, whatever the stage counts.
            result: One line for a reader; the stage prints the same.
        """
        if not self.is_main:
            return
        manifest = StageManifest(
            stage=self.stage,
            status="finished",
            config=self.config,
            inputs=self.inputs,
            counts=dict(counts),
            result=result,
            versions=installed_versions(),
            git=git_state(),
            seed=self.seed,
            started=self._started,
            wall_seconds=round(time.perf_counter() - self._clock, 3),
            command=shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            fingerprint=self.fingerprint,
            outputs=folders.files_of(self.output_dir, {MANIFEST_NAME, RUN_NAME, *self._found}),
        )
        write_json(self.output_dir / MANIFEST_NAME, dataclasses.asdict(manifest))
        (self.output_dir / RUN_NAME).unlink(missing_ok=True)
        self.is_finished = True

    def _open_folder(self, found: tuple[str, dict[str, Any]] | None) -> None:
        """Clear what a kill has left, and mark the folder as this run's, unless its result is there."""
        if self.is_finished:
            (self.output_dir / RUN_NAME).unlink(missing_ok=True)  # killed between the manifest and this
            return
        if found is not None and self.overwrite:
            self._clear(*found)
        self._found = found[1].get("found", []) if self.is_resumed and found else os.listdir(self.output_dir)
        self._found = [name for name in self._found if name not in (folders.LOCK_NAME, folders.WRITER_NAME)]
        remove_torn(self.output_dir, "*" if self.is_resumed else RUN_NAME)  # others may have files in a new folder
        identity = {"stage": self.stage, "fingerprint": self.fingerprint, "config": self.config, "inputs": self.inputs}
        write_json(self.output_dir / RUN_NAME, identity | {"found": self._found})

    def _clear(self, name: str, earlier: Mapping[str, Any]) -> None:
        """Remove what an earlier run has made: a finished one lists its files, an unfinished one what it found before it began."""
        made = earlier.get("outputs")
        if name == RUN_NAME and isinstance(earlier.get("found"), list):
            made = folders.files_of(self.output_dir, earlier["found"])
        if not isinstance(made, list):
            raise ValueError(
                f"{self.output_dir} was made by version 0.1.0, which did not list its files, so they cannot be told from others. "
                "Remove the folder by hand, or give another output_dir."
            )
        folders.remove_files(self.output_dir, [*made, MANIFEST_NAME, RUN_NAME])

    def _find_earlier_run(self) -> tuple[str, dict[str, Any]] | None:
        """The manifest of the earlier run here, or the mark of an unfinished one.

        Raises:
            ValueError: If the folder holds a file of that name that no stage has written.
        """
        for name in (MANIFEST_NAME, RUN_NAME):
            if (self.output_dir / name).is_file():
                found = read_json(self.output_dir / name)
                if not isinstance(found, dict) or not found.keys() >= _OF_A_RUN:
                    raise ValueError(
                        f"{self.output_dir} holds a {name} that no stage of this package has written: the folder is another program's. "
                        "Give another output_dir."
                    )
                return name, found
        return None

    def _describe_conflict(self, name: str, earlier: Mapping[str, Any]) -> str:
        if earlier.get("stage") != self.stage:
            what = f"of the stage {earlier.get('stage')!r}, not {self.stage!r}"
        else:
            before, now = earlier.get("config", {}), self.config
            changes = [
                f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
                for key in sorted({*before, *now} - WHERE_AND_HOW - self.inputs.keys())
                if before.get(key) != now.get(key)
            ]
            changes += [
                f"the content of {key} changed"
                for key, value in self.inputs.items()
                if _identity(earlier.get("inputs", {}).get(key, {})) != _identity(value)
            ]
            what = "of another configuration (" + ("; ".join(changes) or "other inputs") + ")"
        state = "a finished" if name == MANIFEST_NAME else "an unfinished"
        return f"{self.output_dir} holds {state} run {what}. Give another --output_dir, or --overwrite to remove that run's files first."


def describe_input(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """An input's path and the hash of what lies there; the hash is `None` where nothing does (a hub id).

    Of a stage's folder the manifest does not count: it tells when the files were made, and the same files made again are the same
    input.
    """
    if not os.path.exists(path):
        return {"path": str(path), "hash": None}
    try:
        read_manifest(path)
        own = {MANIFEST_NAME}
    except (FileNotFoundError, ValueError):
        own = set()
    return {"path": str(path), "hash": hash_path(path, exclude=own)}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a result, read without importing any of them."""
    installed = {package: version for package in VERSIONED_PACKAGES if (version := _version(package))}
    return {"python": platform.python_version(), **installed}


@functools.lru_cache(maxsize=1)
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the current folder lies in and whether it has uncommitted changes; `None` outside of one."""
    try:
        commit, changes = (
            subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no commit yet
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _identity(described: Mapping[str, str | None]) -> str | None:
    return described.get("hash") or described.get("path")


def _fingerprint(stage: str, config: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str | None]]) -> str:
    what = {key: value for key, value in config.items() if key not in WHERE_AND_HOW and key not in inputs}
    made_of = {"stage": stage, "config": what, "inputs": {name: _identity(value) for name, value in inputs.items()}}
    return xxhash.xxh3_128_hexdigest(json.dumps(made_of, sort_keys=True).encode())


def _to_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON values; what JSON has no word for (a dtype, a path) becomes its text, and secrets are left out."""
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in _SECRETS}, default=str))
