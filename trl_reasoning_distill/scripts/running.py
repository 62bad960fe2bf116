"""How a stage opens its folder: the same for one process and for many, for a run that is new, resumed or done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from os import PathLike

    from accelerate import PartialState

    from trl_reasoning_distill.data.manifest import StageRun


class Folder(Protocol):
    """The options that say where a stage writes."""

    output_dir: str
    overwrite: bool


def settings_of(*parts: Any) -> dict[str, Any]:
    """The options of several dataclasses as one mapping."""
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


@contextlib.contextmanager
def open_run(
    stage: str,
    options: Folder,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str | PathLike[str]],
    seed: int | None = None,
    state: PartialState | None = None,
) -> Iterator[StageRun | None]:
    """Open a stage's folder, on all ranks together.

    Args:
        stage: Name of the stage.
        options: Its folder, and whether to clear it.
        settings: All its options, for the manifest.
        inputs: As `StageRun`.
        seed: The stage's seed.
        state: The launch, if the stage runs on several processes.

    Yields:
        The run; `None` if the folder holds its result already, which is said.

    Raises:
        ValueError: If the folder holds another run.
    """
    from trl_reasoning_distill.data.manifest import StageRun

    is_main = state is None or state.is_main_process
    run = StageRun(stage, options.output_dir, settings, inputs, seed, overwrite=options.overwrite, is_main=is_main)
    with run:
        if state is not None:
            state.wait_for_everyone()
        if run.is_finished and is_main:
            print(f"{stage}: nothing to do, {options.output_dir} holds this run's result")
        yield None if run.is_finished else run
