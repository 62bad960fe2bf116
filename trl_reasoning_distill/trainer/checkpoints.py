"""Checkpoints that are whole or not used: a manifest of hashes beside each, and a look at it before training goes on.

Whoever resumes with `transformers.Trainer` gets no error for an optimizer that is not there, a flipped bit in the weights, another
dataset or another accumulation: the training goes on, and is another one. So each checkpoint gets, as its last file, a manifest with the hash of
every other file and with what decides the course of the training; and a training goes on only from a checkpoint whose files are those,
under settings that are those. On one topology it is then, bit for bit, the training that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_reasoning_distill.data.files import explain_full_disk, flush_to_disk, hash_path, read_json, write_json
from trl_reasoning_distill.trainer.trl_bridge import ExportableState, rotate_checkpoints

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
_NAMES_0_1 = {"top_k": "kd_top_k"}
_VERSION = 1
# What `Trainer` (alone, DeepSpeed, FSDP) names the parts of a checkpoint that a training goes on from
_STATE_FILES = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_0/", "global_step"),
    "scheduler": ("scheduler.pt", "global_step"),
    "random number generator": ("rng_state",),
    "trainer state": ("trainer_state.json",),
}
_FIELDS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "seed", "data_seed", "optim",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16", "loss_type",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that training must not go on from; the message gives the reason and what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, and those newer than it that cannot be used.

    Attributes:
        path: Where it lies; `None` if none can be used.
        skipped: A line for each newer one: its path, and what is wrong with it.
    """

    path: str | None
    skipped: tuple[str, ...] = ()


def write_manifest(checkpoint: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Record every file of a checkpoint, when it is on the disk, and the settings of its training; the manifest appears when it is whole."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            flush_to_disk(path)
            files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "xxh3": hash_path(path)}
    write_json(checkpoint / MANIFEST, {"version": _VERSION, "step": step, "settings": dict(settings), "files": files})


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; `None` if every byte is the one that was saved."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files, version = manifest["files"], manifest["version"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: the training was killed while it was saved, or another program made it"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} is damaged ({error})"
    if version != _VERSION:
        return f"its {MANIFEST} is of version {version}, this is {_VERSION}"
    for part, names in _STATE_FILES.items():
        if not any(file.startswith(names) for file in files):
            return f"it was saved without the state of the {part} (save_only_model?)"
    for name, entry in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, {entry['bytes']:,} were saved"
        if hash_path(file) != entry["xxh3"]:
            return f"{name} is damaged: its bytes are not those that were saved"
    return None


def newest_valid(output_dir: Path) -> Checkpoint:
    """The newest checkpoint below `output_dir` whose files are all right."""
    skipped: list[str] = []
    for path in _checkpoints(output_dir):
        problem = find_problem(path)
        if problem is None:
            return Checkpoint(str(path), tuple(skipped))
        skipped.append(f"{path}: {problem}")
    return Checkpoint(None, tuple(skipped))


def changed_settings(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """Each setting that differs from those a checkpoint was trained with, in words; none if its manifest does not tell."""
    try:
        settings_then = dict(read_json(checkpoint / MANIFEST)["settings"])
        saved = {_NAMES_0_1.get(name, name): value for name, value in settings_then.items()}
    except (OSError, ValueError, KeyError, TypeError):  # `find_problem` reports that
        return []
    now = json.loads(json.dumps(dict(settings)))
    return [
        f"{name} was {saved.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def hash_rows(rows: Dataset) -> str:
    """The hash of a dataset's content and order, whatever file or memory it lies in."""
    digest = xxhash.xxh3_128(json.dumps(sorted(rows.column_names)).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in sorted(rows.column_names):
            column = table.column(name).combine_chunks()  # how memory is cut must not count
            for array in column.chunks if isinstance(column, pa.ChunkedArray) else (column,):
                _update(digest, array)
    return digest.hexdigest()


def _update(digest: Any, array: pa.Array) -> None:
    kind = array.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type):
        digest.update(np.asarray(array.value_lengths(), np.int64).tobytes())
        digest.update(np.asarray(array.flatten(), np.int64).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), sort_keys=True, default=str).encode())


class CheckpointManifests(TrainerCallback):
    """Writes the manifest when a checkpoint is complete on all ranks, and only then removes the oldest (`save_total_limit`).

    Args:
        trainer: The trainer whose `resume_settings` are recorded.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add callbacks that the checkpoint did not have: `Trainer` 5.23 fails on them at its next save."""
        known: Any = state.stateful_callbacks
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                known.setdefault(type(callback).__name__, callback.state())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by `Trainer` on every rank after it has saved."""
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        output_dir = Path(str(args.output_dir))
        write_manifest(
            output_dir / f"checkpoint-{state.global_step}", state.global_step, self.trainer.resume_settings()
        )
        rotate_checkpoints(str(output_dir), args.save_total_limit, state.best_model_checkpoint, use_mtime=True)


class ResumableTrainer(Trainer):
    """A trainer that goes on from a checkpoint exactly, or not at all. Mix it in before another trainer.

    `args.allow_changed_resume` lets it go on from a checkpoint that is damaged or of other settings, with a warning for each.
    """

    resume_fields: tuple[str, ...] = _FIELDS
    """Arguments that decide the course of the training, so that a checkpoint holds only under the same."""

    def resume_settings(self) -> dict[str, Any]:
        """What must be as it was when the checkpoint was saved: data, batch, schedule, and how it is spread over ranks."""
        settings = {name: _plain(getattr(self.args, name)) for name in self.resume_fields}
        return {
            **settings,
            "train_dataset": self._hash_of_rows(),
            "number of processes": self.accelerator.num_processes,
            "distributed type": _distributed_type(self.accelerator),
        }

    def find_checkpoint(self, resume: str | bool | None, *, required: bool = True) -> Checkpoint:
        """The checkpoint to go on from, checked: the same answer or error on all ranks.

        Args:
            resume: `True` (or `"true"`) for the newest valid one in `output_dir`, or the path of one.
            required: Whether it is an error that `output_dir` holds none.

        Raises:
            CheckpointError: If the checkpoint is damaged or incomplete, was trained under other settings, or there is none.
        """
        found: Checkpoint | None = None
        error = None
        if self.is_world_process_zero():
            try:
                found = self._find_checkpoint(resume, required)
            except CheckpointError as refusal:
                error = str(refusal)
        found, error = broadcast_object_list([found, error])
        if error is not None:
            raise CheckpointError(error)
        assert found is not None
        self._checked = found.path
        return found

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`; a checkpoint is checked first (see `find_checkpoint`)."""
        if resume_from_checkpoint and resume_from_checkpoint != getattr(self, "_checked", None):
            found = self.find_checkpoint(resume_from_checkpoint)
            resume_from_checkpoint = found.path
            for line in found.skipped if self.is_world_process_zero() else ():
                logger.warning("Skipped %s", line)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if full := explain_full_disk(error, str(self.args.output_dir), self._describe_kept):
                raise full from error
            raise

    def _describe_kept(self) -> str:
        newest = newest_valid(Path(str(self.args.output_dir))).path
        return f"The newest whole checkpoint is {newest}." if newest else "There is no whole checkpoint yet."

    def _hash_of_rows(self) -> str:
        """`hash_rows` of the training set, computed once as long as it is the same object."""
        rows, digest = getattr(self, "_hashed", (None, ""))
        if rows is not self.train_dataset:
            digest = hash_rows(self.train_dataset)
            self._hashed = (self.train_dataset, digest)
        return digest

    def _find_checkpoint(self, resume: str | bool | None, required: bool) -> Checkpoint:
        newest = resume is True or str(resume).lower() == "true"
        output_dir = Path(str(self.args.output_dir))
        found = newest_valid(output_dir) if newest else Checkpoint(str(resume))
        may_differ = bool(getattr(self.args, "allow_changed_resume", False))
        if found.path is None and required and may_differ:
            states = [path / "trainer_state.json" for path in _checkpoints(output_dir)]
            whole = [str(path.parent) for path in states if path.is_file()]  # without it `Trainer` cannot resume
            found, newest = Checkpoint(whole[0] if whole else None, found.skipped), False
        if found.path is None:
            if required:
                reasons = "; ".join(found.skipped) or "there is none"
                raise CheckpointError(
                    f"No valid checkpoint in {self.args.output_dir}: {reasons}. Start anew, or name one."
                )
            return found
        path = Path(found.path)
        if not path.is_dir():
            raise CheckpointError(f"No checkpoint at {path}.")
        damage = None if newest else find_problem(path)
        problems = [*([damage] if damage else []), *changed_settings(path, self.resume_settings())]
        if not problems:
            return found
        text = f"Training cannot go on from {path} as it began: {'; '.join(problems)}."
        if not may_differ:
            raise CheckpointError(f"{text} Restore what differs, or go on all the same with --allow_changed_resume.")
        logger.warning("%s Going on all the same, as allow_changed_resume is set.", text)
        return found


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(getattr(value, "value", value))


def _distributed_type(accelerator: Any) -> str:
    """DDP, a stage of ZeRO, or a version of FSDP: each writes checkpoints that the others cannot read."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    kind = str(accelerator.distributed_type.value)
    if kind == "DEEPSPEED" and plugin is not None:
        return f"ZeRO-{plugin.zero_stage}"
    if kind == "FSDP":
        return "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    return "one process" if accelerator.num_processes == 1 else "DDP"
