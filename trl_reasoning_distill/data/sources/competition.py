r"""Competition mathematics with a boxed answer: MATH, MATH-500, AIME."""

from __future__ import annotations

from typing import Any

from trl_reasoning_distill.data.sources.base import Fields, SourceSpec, Split, number_text
from trl_reasoning_distill.data.sources.columns import boxed


def _math(row: Fields) -> dict[str, Any]:
    answer = boxed(row["solution"])
    if answer is None:
        raise ValueError("the solution boxes no answer")
    return {
        "question": row["problem"],
        "answer": answer,
        "solution": row["solution"],
        "kind": f"{row['type']}, {row['level'].lower()}",
    }


def _math500(row: Fields) -> dict[str, Any]:
    return {
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row["solution"],
        "kind": row["subject"],
        "id": f"math500-{row['unique_id']}",
    }


def _aime(row: Fields) -> dict[str, Any]:
    """Answers are the integers from 0 to 999, in the exam with leading zeros."""
    answer = number_text(row["answer"])
    if not answer.isdecimal() or int(answer) > 999:
        raise ValueError(f"the answer {row['answer']!r} is no integer from 0 to 999")
    return {"question": row["problem"], "answer": answer, "solution": row.get("solution")}


SPECS = (
    SourceSpec(
        "math",
        _math,
        "DigitalLearningGmbH/MATH-lighteval",
        {"train": Split("train", "math/train.jsonl"), "test": Split("test", "math/test.jsonl")},
        "boxed",
        benchmarks=("test",),
    ),
    SourceSpec(
        "math500",
        _math500,
        "HuggingFaceH4/MATH-500",
        {"test": Split("test", "math/math500.jsonl")},
        "boxed",
        benchmarks=("test",),
    ),
    SourceSpec(
        "aime",
        _aime,
        "HuggingFaceH4/aime_2024",
        {
            "2024": Split("train", "aime/2024.jsonl"),
            "2025": Split("test", "aime/2025.jsonl", hub_id="math-ai/aime25"),
        },
        "boxed",
        benchmarks=("2024", "2025"),
    ),
)
