"""The named sources: grade-school word problems, competition mathematics, and large sets of chains of thought.

A new one is one function from row to problem fields and one `SourceSpec` in `_SPECS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trl_reasoning_distill.data.formatting import ANSWER_MARK, answer_boxed, split_marked_answer
from trl_reasoning_distill.data.shapes import demonstrations
from trl_reasoning_distill.data.sources.base import Fields, SourceSpec, Split, number_text
from trl_reasoning_distill.data.sources.columns import ANSWER_RULES, worked_fields
from trl_reasoning_distill.data.synthetic import SOURCE_NAME

_EXAM_ANSWER = re.compile(r"[\s$\['\"]*(\d{1,3})(?:\.0)?(?:\^\{?\\circ\}?|°)?[\s$\]'\"]*")
_MANY_STEPS = 8
"""GSM8K problems with at least this many steps are of one kind."""


def _gsm8k(row: Fields) -> dict[str, Any]:
    solution, answer = split_marked_answer(row["answer"])
    steps = row["answer"].count("<<")
    return {
        "question": row["question"],
        "answer": answer,
        "solution": solution,
        "kind": f"{min(steps, _MANY_STEPS)}{'+' if steps >= _MANY_STEPS else ''} steps",
    }


def _gsm_hard(row: Fields) -> dict[str, Any]:
    return {"question": row["input"], "answer": number_text(row["target"])}


def _gsm_plus(row: Fields) -> dict[str, Any]:
    """The perturbation "critical thinking" asks what cannot be answered: its answer is the text "None"."""
    if str(row["answer"]).strip().lower() == "none":
        raise ValueError(f"it has no answer ({row['perturbation_type']}): the question lacks what it would need")
    solution = split_marked_answer(row["solution"])[0] if ANSWER_MARK in row["solution"] else None
    return {
        "question": row["question"],
        "answer": number_text(row["answer"]),
        "solution": solution or None,
        "kind": row["perturbation_type"],
    }


def _svamp(row: Fields) -> dict[str, Any]:
    return {
        "question": _as_sentences(row["Body"], row["Question"]),
        "answer": number_text(row["Answer"]),
        "kind": row["Type"].replace("Divison", "Division"),  # one row is misspelt
        "id": f"svamp-{row['ID']}",
    }


def _asdiv(row: Fields) -> dict[str, Any]:
    """The answer carries its unit, `9 (apples)`; what is no number (`2:3`, a name) stays text."""
    answer = row["answer"].partition("(")[0].strip()
    try:
        answer = number_text(answer)
    except ValueError:
        answer = answer.rstrip(";, ")
    return {
        "question": _as_sentences(row["body"], row["question"]),
        "answer": answer,
        "kind": row["solution_type"],
    }


def _as_sentences(body: str, question: str) -> str:
    body = body.strip()
    return f"{body}{'.' if body[-1:].isalnum() else ''} {question.strip()}".strip()


def _math(row: Fields) -> dict[str, Any]:
    return {
        "question": row["problem"],
        "answer": ANSWER_RULES["boxed"](row["solution"]),
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
    r"""Answers are the integers from 0 to 999, in the exam with leading zeros; some copies box them or add `^\circ`."""
    text = str(row["answer"])
    match = _EXAM_ANSWER.fullmatch(answer_boxed(text) or text)
    if match is None:
        raise ValueError(f"the answer {row['answer']!r} is no integer from 0 to 999")
    return {"question": row["problem"], "answer": str(int(match[1])), "solution": row.get("solution")}


def _numinamath_qwq(row: Fields) -> dict[str, Any]:
    """A response that was found wrong is no solution; its question is still a problem."""
    if not row.get("correct", True):
        return {"question": row["prompt"], "answer": row["ground_truth"]}
    return worked_fields(demonstrations(row, "numinamath_qwq")[0])


def _openthoughts(row: Fields) -> dict[str, Any]:
    return worked_fields(demonstrations(row, "openthoughts")[0]) | {"kind": row.get("domain") or ""}


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
        worked = demonstrations(row, "openr1_math")[0] if row.get("generations") else None
    except ValueError:  # no generation is both correct and complete
        worked = None
    if worked is not None:
        problem |= {"solution": worked.reasoning, "response": worked.response}
    return problem


_SPECS = (
    SourceSpec(
        "gsm8k",
        _gsm8k,
        "openai/gsm8k",
        {"train": Split("train", "gsm8k/train.jsonl"), "test": Split("test", "gsm8k/test.jsonl")},
        "gsm8k",
        config="main",
        benchmarks=("test",),
    ),
    SourceSpec(
        "gsm_hard",
        _gsm_hard,
        "reasoning-machines/gsm-hard",
        {"test": Split("train", "gsm_hard/test.jsonl")},
        "gsm8k",
        benchmarks=("test",),
    ),
    SourceSpec(
        "gsm_plus",
        _gsm_plus,
        "qintongli/GSM-Plus",
        {"test": Split("test", "gsm_plus/test.jsonl"), "testmini": Split("testmini", "gsm_plus/testmini.jsonl")},
        "gsm8k",
        benchmarks=("test",),
    ),
    SourceSpec(
        "svamp",
        _svamp,
        "ChilleD/SVAMP",
        {"test": Split("test", "svamp/svamp.jsonl"), "train": Split("train", "svamp/train.jsonl")},
        "gsm8k",
        benchmarks=("test",),
    ),
    SourceSpec(
        "asdiv",
        _asdiv,
        "EleutherAI/asdiv",
        {"test": Split("validation", "asdiv/test.jsonl")},
        "gsm8k",
        config="asdiv",
        revision="refs/convert/parquet",  # the repository itself holds a script, which `datasets` no longer runs
        benchmarks=("test",),
    ),
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

SOURCES: Mapping[str, SourceSpec] = {spec.name: spec for spec in _SPECS}
SOURCE_NAMES = (SOURCE_NAME, *SOURCES, "jsonl")

BENCHMARKS: tuple[tuple[str, str], ...] = tuple(
    (spec.name, split) for spec in SOURCES.values() for split in spec.benchmarks
)
"""Source and split of every evaluation set."""
