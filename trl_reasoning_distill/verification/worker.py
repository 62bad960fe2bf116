"""The process that compares answers symbolically: `python -m trl_reasoning_distill.verification.worker`.

Reads one JSON task per line (`{"pairs": [[gold, prediction], …], "tolerance_digits": 6, "seconds": 2.0}`) and writes one JSON
result per line (`{"status": …, "reason": …}`). Symbolic algebra can run for ever and eat all memory; so it runs here, where the
system can kill it: at `seconds` of its own computing time, so that a busy machine changes no verdict. math-verify's own time-outs
are off: they need the main thread, and turn a time-out into "wrong".
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import signal
import sys
from typing import Any

from trl_reasoning_distill.verification.pool import OUT_OF_MEMORY

MEMORY_HEADROOM = 1 << 30
"""Bytes of address space that one item may take on top of what the worker holds when idle."""


# What sympy imports at its first use, and what the parser learns of its grammar, shall not count against the first items.
_WARM_UP = (
    ("$1$", "\\boxed{1}"),
    ("$-2 \\le x \\le 7$", "$x \\in [-2,7]$"),
    ("$\\sqrt{2}+x$", "$x+\\sqrt2$"),
    ("$\\{1,2\\}$", "$2,1$"),
    ("$\\frac{\\sqrt{3}}{2}\\pi$", "$-3x^{2}+4x-\\frac{7\\pi}{6}$"),
    ("$(3, \\frac{\\pi}{2})$", "$\\left(-\\infty, 0\\right]\\cup(2,5)$"),
    ("$\\begin{pmatrix} -1/3 & x \\\\ 2 & 0 \\end{pmatrix}$", "$y = 2\\sin(x)+\\log_2(3)$"),
    ("$1+2i$", "$x^2+y^2=4$"),
)


def compare(pairs: list[tuple[str, str]], tolerance_digits: int) -> tuple[str, str]:
    """Whether any of the (gold, prediction) pairs is equal: the status of a verdict, and its reason.

    Some gold must be readable, else the question is undecided: a gold answer that nobody can read proves no one wrong.

    Raises:
        Exception: Whatever the comparison raises, which math-verify by itself takes for "not equal".
    """
    from math_verify import verify

    gold_readable = False
    reason = "no prediction could be read as mathematics"
    for gold_text, prediction_text in pairs:
        gold = _parse(gold_text)
        if not gold:
            continue
        gold_readable = True
        prediction = _parse(prediction_text)
        options = {"float_rounding": tolerance_digits, "timeout_seconds": None, "raise_on_error": True}
        if prediction and verify(gold, prediction, **options):
            return "correct", f"{prediction[0]} equals {gold[0]}"
        if prediction:
            reason = f"{prediction[0]} is not {gold[0]}"
    if not gold_readable:
        return "undecided", "the gold answer could not be read as mathematics"
    return "incorrect", reason


@functools.lru_cache(maxsize=256)  # the samples of one problem share their gold answer
def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def make_faster() -> None:
    """Take two detours out of math-verify, in this process. Neither changes a verdict; together they halve the time.

    - ANTLR decides between alternatives with the whole context (LL), although its quick mode (SLL) reads nearly all answers: the
      quick mode goes first, and the slow one reads what it rejects, as the makers of ANTLR recommend.
    - A difference is simplified to see whether it is zero, although its value at one point often shows that it is not.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.antlr_parser import PSParser
    from math_verify import grader

    read, simplify = PSParser.math, grader.simplify

    def read_quickly(parser: Any) -> Any:
        parser.getTokenStream().fill()  # a character that is no token fails here, before anything can step over it
        parser._interp.predictionMode = PredictionMode.SLL
        try:
            return read(parser)
        except Exception:  # the error listener's, for any syntax error
            parser.reset()
            parser._interp.predictionMode = PredictionMode.LL
            return read(parser)

    def simplify_if_it_may_be_zero(expression: Any) -> Any:
        try:
            return expression if _is_clearly_not_zero(expression) else simplify(expression)
        except MemoryError:  # math-verify would take it for "not equal"
            os._exit(OUT_OF_MEMORY)

    PSParser.math, grader.simplify = read_quickly, simplify_if_it_may_be_zero


def _is_clearly_not_zero(expression: Any) -> bool:
    """Whether an expression's value, with an arbitrary number for each variable, is far from zero."""
    try:
        symbols = sorted(expression.free_symbols, key=str)
        point = {symbol: 0.6180339887 + 0.2718281828 * index for index, symbol in enumerate(symbols)}
        return abs(complex(expression.evalf(15, subs=point))) > 1e-3  # NaN is not greater
    except MemoryError:
        raise
    except Exception:  # what has no value is simplified
        return False


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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; when it goes, the input closes
    logging.disable(logging.CRITICAL)
    make_faster()
    sys.set_int_max_str_digits(4300)
    # Results go through their own handle, so that nothing a library prints can get between them.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    for gold, prediction in _WARM_UP:
        compare([(gold, prediction)], 6)
    gc.collect()
    gc.freeze()  # what is loaded stays
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
