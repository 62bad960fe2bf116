"""Worker processes that are killed and started anew when an item takes too long, too much memory, or crashes.

Plain subprocesses and pipes, not `multiprocessing`: a forked child of a process with threads or CUDA is broken, and a spawned one
runs the user's `__main__` again. So the pool works in trainers, threads, notebooks and unguarded scripts. (`pebble`, which also kills
a worker that is late, starts its workers through `multiprocessing`, has no memory limit, and measures time by the clock, so a busy
machine would change verdicts; here a limit is of computing time.)
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

_START_SECONDS = 120.0
_ITEMS_PER_WORKER = 5000  # sympy's caches grow; a worker is replaced before they press on the memory limit
_ITEMS_WORTH_A_WORKER = 4  # to start one takes about a second of computing
_TIME_UP = int(getattr(signal, "SIGPROF", 0))
OUT_OF_MEMORY = 3
"""Exit code of a worker that reached its memory limit."""
_MODULE = "trl_reasoning_distill.verification.worker"


@dataclass(frozen=True)
class Comparison:
    """One item for a worker: (gold, prediction) pairs, any of which makes it correct."""

    pairs: tuple[tuple[str, str], ...]
    tolerance_digits: int = 6


@dataclass(frozen=True)
class Outcome:
    """What a worker said, or what became of it: a verdict's status and reason, and whether its time ran out."""

    status: str
    reason: str
    timed_out: bool = False


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    item: int | None = None
    served: int = 0
    buffer: bytearray = field(default_factory=bytearray)

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


class ComparisonPool:
    """Up to `size` workers, started when they are first needed and kept until `close`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, items: Sequence[Comparison], timeout: float) -> list[Outcome]:
        """Compare all items, each within `timeout` seconds of its own; the order is kept. Safe to call from any thread."""
        with self._lock:
            try:
                return _Run(self, items, timeout).outcomes()
            except (
                BaseException
            ):  # Ctrl-C, or a worker that does not start: no later run may read what these were asked
                self.close()
                raise

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            _kill(worker)
        self._workers.clear()

    def start_worker(self) -> _Worker:
        """Start one process; it is ready when it has written its first line."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        worker = _Worker(process, time.monotonic() + _START_SECONDS)
        self._workers.append(worker)
        return worker

    def drop(self, worker: _Worker) -> None:
        """Kill a worker and forget it."""
        _kill(worker)
        self._workers.remove(worker)

    @property
    def workers(self) -> list[_Worker]:
        return list(self._workers)


class _Run:
    """One call of `ComparisonPool.run`: hands items to idle workers and waits for whichever speaks or runs out of time first."""

    def __init__(self, pool: ComparisonPool, items: Sequence[Comparison], timeout: float) -> None:
        self.pool, self.items, self.timeout = pool, items, timeout
        # A worker measures its computing time itself, where the system can; the wall clock is for one that only sleeps.
        self.patience = 10 * timeout + 30 if _TIME_UP else timeout
        self.waiting = deque(range(len(items)))
        self.results: dict[int, Outcome] = {}
        self.retried: set[int] = set()

    def outcomes(self) -> list[Outcome]:
        while len(self.results) < len(self.items):
            wanted = 1 + (len(self.items) - len(self.results)) // _ITEMS_WORTH_A_WORKER
            missing = min(self.pool.size, wanted) - len(self.pool.workers)
            for _ in range(missing):
                self.pool.start_worker()
            for worker in self.pool.workers:
                if worker.ready and worker.item is None and self.waiting:
                    self._assign(worker)
            self._wait()
        return [self.results[index] for index in range(len(self.items))]

    def _assign(self, worker: _Worker) -> None:
        worker.item = self.waiting.popleft()
        worker.deadline = time.monotonic() + self.patience
        item = self.items[worker.item]
        task = {"pairs": list(item.pairs), "tolerance_digits": item.tolerance_digits, "seconds": self.timeout}
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; its closed output says so in a moment
            worker.process.stdin.write(json.dumps(task).encode() + b"\n")
            worker.process.stdin.flush()

    def _wait(self) -> None:
        busy = [worker for worker in self.pool.workers if not worker.ready or worker.item is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.output, selectors.EVENT_READ, worker)
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            for key, _ in selector.select(patience):
                self._read(key.data)
        for worker in busy:
            if (
                worker in self.pool.workers
                and (not worker.ready or worker.item is not None)
                and time.monotonic() > worker.deadline
            ):
                self._end(worker, f"no result within {self.timeout:g} s", retry=False, timed_out=True)

    def _read(self, worker: _Worker) -> None:
        chunk = os.read(worker.output.fileno(), 1 << 16)
        if not chunk:
            code = worker.process.wait()
            if _TIME_UP and code == -_TIME_UP:
                self._end(worker, f"no result within {self.timeout:g} s", retry=False, timed_out=True)
            else:
                reason = (
                    "more than 1 GiB of memory needed"
                    if code == OUT_OF_MEMORY
                    else f"the comparing process died with code {code}"
                )
                self._end(worker, reason, retry=worker.served > 0)
            return
        worker.buffer += chunk
        if not worker.buffer.endswith(b"\n"):
            return
        message = json.loads(worker.buffer)
        worker.buffer.clear()
        if not worker.ready:
            worker.ready = True
        elif worker.item is not None:
            self.results[worker.item] = Outcome(message["status"], message["reason"])
            worker.item = None
            worker.served += 1
            if worker.served >= _ITEMS_PER_WORKER:
                self.pool.drop(worker)

    def _end(self, worker: _Worker, reason: str, retry: bool, timed_out: bool = False) -> None:
        """Kill a worker; its item is undecided, unless what earlier items left behind may be to blame and it gets a fresh worker."""
        self.pool.drop(worker)
        item = worker.item
        if item is None:
            raise RuntimeError(
                f"A verification worker did not start ({reason}). Does `{sys.executable} -m {_MODULE}` run?"
            )
        if retry and item not in self.retried:
            self.retried.add(item)
            self.waiting.appendleft(item)
        else:
            self.results[item] = Outcome("undecided", reason, timed_out)


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    worker.process.wait()


_pools: dict[tuple[int, int], ComparisonPool] = {}
_pools_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child, where the thread that held the lock does not exist."""
    global _pools_lock
    _pools_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def shared_pool(size: int) -> ComparisonPool:
    """The process's pool of `size` workers. A forked child gets its own: its parent's pipes are not its to read."""
    with _pools_lock:
        key = (os.getpid(), size)
        if key not in _pools:
            _pools[key] = ComparisonPool(size)
        return _pools[key]


@atexit.register
def _close_pools() -> None:
    for (pid, _), pool in _pools.items():
        if pid == os.getpid():
            pool.close()
