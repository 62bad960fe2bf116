"""The first signal asks, its echoes are ignored, a later one means it; a rank goes with its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trl_reasoning_distill import processes
from trl_reasoning_distill.processes import InterruptedBySignal, interrupt, on_interruption

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    return now


def test_the_first_asks_its_echo_is_ignored_a_later_one_stops_at_once(clock: list[float]) -> None:
    asked: list[int] = []
    with pytest.raises(InterruptedBySignal) as stopped, on_interruption(asked.append):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += processes.ECHO_SECONDS / 2
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGTERM]
        clock[0] += processes.ECHO_SECONDS
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_work_that_is_safe_at_any_moment_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGTERM") as stopped, on_interruption(interrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(stopped.value, InterruptedBySignal)
    assert stopped.value.exit_code == 143


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_interruption(interrupt):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_changes_nothing() -> None:
    seen: list[object] = []

    def work() -> None:
        with on_interruption(interrupt):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


RANK = """
import sys, time
from trl_reasoning_distill.processes import end_with_launcher
end_with_launcher(0.05)
print("at work", flush=True)
time.sleep(float(sys.argv[1]))
print("done", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"


@pytest.mark.parametrize(("started_by", "said"), [("TORCHELASTIC_RUN_ID", ""), ("TRD_COMMAND", ""), (None, "done\n")])
def test_a_process_goes_with_a_launcher_that_is_killed(started_by: str | None, said: str) -> None:
    launchers = ("TORCHELASTIC_RUN_ID", "TRD_COMMAND")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    environment |= {started_by: "x"} if started_by else {}
    seconds = "60" if started_by else "1"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, seconds], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "at work\n"
    launcher.kill()
    assert launcher.communicate(timeout=30)[0] == said  # the process writes to the same pipe: its end is the process's


def test_accelerate_is_known_by_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, is_known in (
        (["/env/bin/python", "/env/bin/accelerate", "launch", "recipes/sft.py"], True),
        (["/env/bin/python", "recipes/sft.py"], False),
        (["bash", "-c", "accelerate launch x"], False),
    ):
        monkeypatch.setattr("psutil.Process.cmdline", lambda self, words=words: words)
        assert processes._is_accelerate(os.getpid()) == is_known


@pytest.mark.distributed
def test_one_process_behind_accelerate_goes_with_the_front_process(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(RANK.replace("float(sys.argv[1])", "60"))
    words = ["--config_file", "accelerate_configs/cpu.yaml", "--num_cpu_threads_per_process", "1", str(script)]
    accelerate = Path(sys.executable).with_name("accelerate")
    front = subprocess.Popen(
        [sys.executable, str(accelerate), "launch", *words], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert front.stdout is not None
    assert front.stdout.readline() == "at work\n"
    front.kill()
    assert front.communicate(timeout=30)[0] == ""
