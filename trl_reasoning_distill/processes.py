"""SIGTERM and Ctrl-C: the first one asks to stop, and what was made is kept.

A terminal sends Ctrl-C to every process of a launch, and a launcher hands signals on to its children, so one wish to stop arrives
several times. What comes within `ECHO_SECONDS` of the first is its echo; what comes later means "at once". A launcher that is killed
can hand nothing on: its ranks see that it has gone, and go too.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 5.0


class InterruptedBySignal(KeyboardInterrupt):
    """A signal asked this process to stop.

    Attributes:
        number: The signal; a process that ends because of it leaves with `exit_code`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


def interrupt(number: int) -> None:
    """Stop here: for work that is safe on disk at any moment."""
    raise InterruptedBySignal(number)


@contextmanager
def on_interruption(ask: Callable[[int], None]) -> Iterator[None]:
    """Call `ask` with the number of the first SIGINT or SIGTERM; a later one that is no echo raises `InterruptedBySignal`.

    Signals that are ignored (`nohup`, a background job) stay ignored. Outside the main thread, where Python takes no signals,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            ask(number)
        elif now - first > ECHO_SECONDS:
            raise InterruptedBySignal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def end_with_launcher(look_every: float = 0.2) -> None:
    """Kill this rank as soon as the launcher that started it has gone.

    torchrun, and so `accelerate launch`, starts each rank in a session of its own: `kill -9` of the launcher or of its process group leaves
    the ranks at work, beside those of the launch that is to go on in their place. In a process that torchrun did not start
    nothing happens: one behind `nohup` may outlive its parent.

    Args:
        look_every: Seconds between two looks.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(look_every)
        os.kill(os.getpid(), signal.SIGKILL)  # what is on the disk is safe at any moment, as after any other `kill -9`

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()


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
