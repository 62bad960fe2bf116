"""The verifier where users call it: threads, an event loop, a forked child, a notebook that is interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trl_reasoning_distill.verification.pool import Comparison, ComparisonPool
from trl_reasoning_distill.verification.verify import verify_answer, verify_answers

OUTPUT, GOLD = "\\boxed{\\sqrt{8}}", "2\\sqrt{2}"


def test_many_threads_share_the_workers() -> None:
    found: dict[int, list[str]] = {}

    def verify(number: int) -> None:
        outputs = [f"\\boxed{{\\sqrt{{{k * k * 2}}}}}" for k in range(2, 6)]
        golds = [f"{k if number % 2 else k + 1}\\sqrt{{2}}" for k in range(2, 6)]
        found[number] = [verdict.status for verdict in verify_answers(outputs, golds, num_workers=1)]

    threads = [threading.Thread(target=verify, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: ["correct" if number % 2 else "incorrect"] * 4 for number in range(4)}


def test_a_running_event_loop_may_verify_as_a_notebook_does() -> None:
    async def cell() -> list[str]:
        direct = verify_answer(OUTPUT, GOLD).status
        aside = await asyncio.gather(*(asyncio.to_thread(verify_answer, OUTPUT, GOLD) for _ in range(3)))
        return [direct, *(verdict.status for verdict in aside)]

    assert asyncio.run(cell()) == ["correct"] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own_workers() -> None:
    assert verify_answer(OUTPUT, GOLD).status == "correct"
    child = os.fork()
    if child == 0:
        os._exit(0 if verify_answer("\\boxed{\\sqrt{18}}", "3\\sqrt{2}").status == "correct" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verify_answer(OUTPUT, GOLD).status == "correct"


def test_an_unguarded_script_may_verify(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from trl_reasoning_distill.verification.verify import verify_answer\nprint(verify_answer({OUTPUT!r}, {GOLD!r}).status)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "correct\n"
    assert done.stderr == ""


def test_after_an_interrupt_no_answer_goes_to_another_question() -> None:
    pool = ComparisonPool(1)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    try:
        assert pool.run([Comparison((("$1$", "$1$"),))], 5.0)[0].status == "correct"
        timer = threading.Timer(0.5, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.run([Comparison((("$9^{9^{9^{9}}}$", "$2$"),)), Comparison((("$1$", "$1$"),))], 60.0)
        outcomes = pool.run([Comparison((("$1$", "$2$"),)), Comparison((("$2$", "$2$"),))], 5.0)
        assert [outcome.status for outcome in outcomes] == ["incorrect", "correct"]
    finally:
        pool.close()
