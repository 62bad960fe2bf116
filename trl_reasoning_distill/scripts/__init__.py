"""The stages: one script each, with `make_parser()` and `main(args)`; shared by `recipes/<stage>.py` and the installed command."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """A line of the table below.

    Attributes:
        summary: One line for `trl-distill --help`.
        accelerated: Whether `trl-distill` starts it with `accelerate launch` even if no launcher option asks for that.
    """

    summary: str
    accelerated: bool


STAGES = {
    "data": Stage("load problems from a named source, a file or the hub", accelerated=False),
    "generate": Stage("let a teacher write n solutions for each problem", accelerated=True),
    "verify": Stage("check each solution's answer, and keep right ones for training", accelerated=False),
    "select": Stage("choose training examples from verified solutions anew", accelerated=False),
    "sft": Stage("fine-tune a student on text", accelerated=True),
    "capture": Stage("store a teacher's Top-K log-probabilities for each trained token", accelerated=True),
    "align": Stage("map a store to a student with another vocabulary or tokenizer", accelerated=False),
    "distill": Stage("train a student on text and a teacher's stored log-probabilities", accelerated=True),
    "gkd": Stage("train a student on its own text, with a live teacher", accelerated=True),
    "evaluate": Stage("let models answer a test set, and verify the answers", accelerated=True),
    "report": Stage("compare evaluated models: report.html, report.md, comparison.json", accelerated=False),
    "chat": Stage("ask the student and the teacher the same question, side by side", accelerated=False),
    "store": Stage("look into a Top-K store, and check it", accelerated=False),
}
"""Every stage, in order from problems to report; the name is also the script's module name."""
