"""Named problem sources: `load_problems("gsm8k", split="train", limit=1000)`.

A source is a `SourceSpec`: where its rows lie, and one function that makes a problem's fields from a row. Beside the named ones,
`jsonl` (or a path) reads a file and `hub:ORGANISATION/NAME` reads any dataset of the hub, both with a column map:

    load_problems("jsonl", path="mine.jsonl", columns={"question": "prompt", "answer": "target"})
    load_problems("hub:openai/gsm8k", config="main", split="test", columns={"question": "question", "answer": "answer"}, answer_rule="gsm8k")

A row that cannot be a problem is left out, counted, and named with its reason: `read_source` returns these, `load_problems` logs them.
"""

from trl_reasoning_distill.data.sources.base import (
    Cause,
    Refusal,
    RejectedRow,
    SourceRead,
    SourceSpec,
    SourceUnavailableError,
    Split,
)
from trl_reasoning_distill.data.sources.columns import ANSWER_RULES
from trl_reasoning_distill.data.sources.reading import PROBLEMS_NAME, load_problems, read_source
from trl_reasoning_distill.data.sources.registry import BENCHMARKS, SOURCE_NAMES, SOURCES

__all__ = [
    "ANSWER_RULES",
    "BENCHMARKS",
    "PROBLEMS_NAME",
    "SOURCES",
    "SOURCE_NAMES",
    "Cause",
    "Refusal",
    "RejectedRow",
    "SourceRead",
    "SourceSpec",
    "SourceUnavailableError",
    "Split",
    "load_problems",
    "read_source",
]
