"""SIGTERM and Ctrl-C: the first one asks to stop, and what was made is kept.

A terminal sends Ctrl-C to every process of a launch, and a launcher hands signals on to its children, so one wish to stop arrives
several times. What comes within `ECHO_SECONDS` of the first is its echo; what comes later means "at once". A launcher that is killed
can hand nothing on: its ranks see that it has gone, and go too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
