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
COMMAND_VARIABLE = "TRD_COMMAND"
"""The environment variable in which `trl-distill` gives the processes that it starts what the user typed."""


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
    """Kill this process as soon as the launcher that started it has gone.

    torchrun, and so `accelerate launch`, starts each rank in a session of its own: `kill -9` of the launcher or of its process group leaves
    the ranks at work, beside those of the launch that is to go on in their place. So does `kill -9` of a `trl-distill`, or of an `accelerate
    launch`, that waits for one process. A process that none of them started may outlive its parent, as one behind `nohup` does.

    Args:
        look_every: Seconds between two looks.
    """
    launcher = os.getppid()
    if not ({"TORCHELASTIC_RUN_ID", COMMAND_VARIABLE} & os.environ.keys() or _is_accelerate(launcher)):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(look_every)
        os.kill(os.getpid(), signal.SIGKILL)  # what is on the disk is safe at any moment, as after any other `kill -9`

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()


def _is_accelerate(process: int) -> bool:
    """Whether a process is an `accelerate launch`."""
    import psutil

    try:
        words = psutil.Process(process).cmdline()
    except psutil.Error:
        return False
    return "launch" in words and any(os.path.basename(word) in ("accelerate", "accelerate.exe") for word in words)


def launch_state() -> PartialState:
    """Rank, device and barriers of this launch, made by the first call; a stage makes it once and hands it down.

    Ranks end their shares of a generation at very different times, so a barrier may wait for hours, where torch's default
    gives up after 10 minutes. For a training `TrainingArguments` has made it, with its own `ddp_timeout`.

    Raises:
        ValueError: If several processes were launched that do not know of each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # `Accelerator` reads this variable, `PartialState` does not
    on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU") or runs_on_cpus()
    state = PartialState(cpu=on_cpus, timeout=datetime.timedelta(days=7))
    check_launch(state)
    return state


def runs_on_cpus() -> bool:
    """Whether several processes were launched on a machine without an accelerator.

    accelerate has to be told, or each of them takes itself for the only one: `accelerate launch` does not hand `use_cpu: true` on to several
    processes. A training is told by its option `use_cpu`, and not by accelerate's environment variable, which would also
    make accelerate run DDP in DeepSpeed's place without a word; where that is set, it is left to decide.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "ACCELERATE_USE_CPU" in os.environ:
        return False
    import torch

    return not torch.accelerator.is_available()


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
