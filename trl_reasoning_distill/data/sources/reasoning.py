"""Large sets with chains of thought by a reasoning model: NuminaMath-QwQ, OpenThoughts, OpenR1-Math."""

from __future__ import annotations

from typing import Any

from trl_reasoning_distill.data.conversion import Demonstration, convert_row
from trl_reasoning_distill.data.sources.base import Fields, SourceSpec, Split


def _worked(demonstration: Demonstration) -> dict[str, Any]:
    return {
        "question": demonstration.question,
        "answer": demonstration.final_answer,
        "solution": demonstration.reasoning,
        "response": demonstration.response,
    }


def _numinamath_qwq(row: Fields) -> dict[str, Any]:
    """A response that was found wrong is no solution; its question is still a problem."""
    if not row.get("correct", True):
        return {"question": row["prompt"], "answer": row["ground_truth"]}
    return _worked(convert_row(row, "numinamath_qwq")[0])


def _openthoughts(row: Fields) -> dict[str, Any]:
    return _worked(convert_row(row, "openthoughts")[0]) | {"kind": row.get("domain") or ""}


def _openr1_math(row: Fields) -> dict[str, Any]:
    """The surest of the correct generations; without one, the question and its short reference solution."""
    problem = {
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row.get("solution"),
        "kind": row.get("problem_type") or "",
        "id": f"openr1-{row['uuid']}" if row.get("uuid") else None,
    }
    try:
        worked = convert_row(row, "openr1_math")[0] if row.get("generations") else None
    except ValueError:  # no generation is both correct and complete
        worked = None
    if worked is not None:
        problem |= {"solution": worked.reasoning, "response": worked.response}
    return problem


SPECS = (
    SourceSpec(
        "numinamath_qwq",
        _numinamath_qwq,
        "PrimeIntellect/NuminaMath-QwQ-CoT-5M",
        {"train": Split("train", "numinamath_qwq/train.jsonl")},
        "think",
        streaming=True,
    ),
    SourceSpec(
        "openthoughts",
        _openthoughts,
        "open-thoughts/OpenThoughts-114k",
        {"train": Split("train", "openthoughts/train.jsonl")},
        "think",
        streaming=True,
    ),
    SourceSpec(
        "openr1_math",
        _openr1_math,
        "open-r1/OpenR1-Math-220k",
        {"train": Split("train", "openr1_math/train.jsonl")},
        "think",
        config="default",
        streaming=True,
    ),
)
