"""The processes of one launch: do they know of each other?"""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def launch_state() -> PartialState:
    """Rank, device and barriers of this launch.

    Ranks end their shares of a generation at very different times, so a barrier may wait for hours, where torch's default
    gives up after 10 minutes. This must be the process's first `PartialState` for the time-out to count.

    Raises:
        ValueError: If several processes were launched that do not know of each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    share_cpus()
    # `Accelerator` reads this variable, `PartialState` does not
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(days=7))
    check_launch(state)
    return state


def share_cpus() -> None:
    """Tell accelerate that the processes of this launch belong together, if they have no accelerator to tell by.

    `accelerate launch` does not hand `use_cpu: true` on to several processes, and without it each of them thinks that it is the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"


def let_deepspeed_shard_on_cpus() -> None:
    """Keep accelerate from running DDP in DeepSpeed's place, without a word, on processes that have no accelerator.

    To be called when they know of each other: from then on it takes `ACCELERATE_USE_CPU` for a wish to leave DeepSpeed out.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        os.environ.pop("ACCELERATE_USE_CPU", None)


def check_launch(state: PartialState) -> None:
    """Refuse a launch that accelerate took for another than it is.

    Raises:
        ValueError: If several processes were launched that do not know of each other, or FSDP that has become DDP.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}: without an accelerator, "
            "set `use_cpu: true` in the accelerate config."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and state.device.type == "cpu":
        raise ValueError(
            "FSDP was asked for, but there is no accelerator, and on CPUs accelerate would run DDP instead without a word. "
            "Use accelerate_configs/zero2.yaml or zero3.yaml with `use_cpu: true`, or ddp.yaml."
        )
