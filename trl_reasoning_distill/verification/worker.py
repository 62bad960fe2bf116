"""The process that compares answers symbolically: `python -m trl_reasoning_distill.verification.worker`.

Reads one JSON task per line (`{"pairs": [[gold, prediction], …], "tolerance_digits": 6, "seconds": 2.0}`) and writes one JSON
result per line (`{"status": …, "reason": …}`). Symbolic algebra can run for ever and eat all memory; so it runs here, where the
system can kill it: at `seconds` of its own computing time, so that a busy machine changes no verdict. math-verify's own time-outs
are off: they need the main thread, and turn a time-out into "wrong".
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Any

from trl_reasoning_distill.verification.pool import OUT_OF_MEMORY

MEMORY_HEADROOM = 1 << 30
"""Bytes of address space that one item may take on top of what the worker holds when idle."""


# What sympy imports at its first use shall not count against the first items.
_WARM_UP = (
    ("$1$", "\\boxed{1}"),
    ("$-2 \\le x \\le 7$", "$x \\in [-2,7]$"),
    ("$\\sqrt{2}+x$", "$x+\\sqrt2$"),
    ("$\\{1,2\\}$", "$2,1$"),
)


def compare(pairs: list[tuple[str, str]], tolerance_digits: int) -> tuple[str, str]:
    """Whether any of the (gold, prediction) pairs is equal: the status of a verdict, and its reason.

    The first pair's gold must be readable, else the question is undecided: a gold answer that nobody can read proves no one wrong.
    """
    from math_verify import parse, verify

    gold_readable = False
    reason = "no prediction could be read as mathematics"
    for gold_text, prediction_text in pairs:
        gold = parse(gold_text, parsing_timeout=None)
        if not gold:
            continue
        gold_readable = True
        prediction = parse(prediction_text, parsing_timeout=None)
        if prediction and verify(gold, prediction, float_rounding=tolerance_digits, timeout_seconds=None):
            return "correct", f"{prediction[0]} equals {gold[0]}"
        if prediction:
            reason = f"{prediction[0]} is not {gold[0]}"
    if not gold_readable:
        return "undecided", "the gold answer could not be read as mathematics"
    return "incorrect", reason


def _end_after(seconds: float) -> None:
    """Have the system end this process after so much computing, even in the middle of a long C loop; 0 calls that off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    if sys.platform != "linux":
        return
    import resource

    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Serve tasks until the input closes."""
    import math_verify  # noqa: F401  # so that no item pays for the import

    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(4300)
    # Results go through their own handle, so that nothing a library prints can get between them.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    for gold, prediction in _WARM_UP:
        compare([(gold, prediction)], 6)
    _limit_memory()
    print("{}", file=results, flush=True)
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        _end_after(task["seconds"])
        try:
            status, reason = compare(task["pairs"], task["tolerance_digits"])
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # whatever is left of the heap, the next item shall not suffer from it
        except RecursionError:
            status, reason = "undecided", "too deeply nested to compare"
        except Exception as error:  # math-verify and sympy raise anything; all of it means: not decided
            status, reason = "undecided", f"the comparison failed: {type(error).__name__}: {error}"
        _end_after(0)
        print(json.dumps({"status": status, "reason": reason[:300]}), file=results, flush=True)


if __name__ == "__main__":
    main()
