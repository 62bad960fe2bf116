"""Word problems with a number for an answer: GSM8K and the sets made from it, SVAMP, ASDiv."""

from __future__ import annotations

from typing import Any

from trl_reasoning_distill.data.conversion import remove_calculator_marks
from trl_reasoning_distill.data.sources.base import Fields, SourceSpec, Split, number_text

_MANY_STEPS = 8


def _gsm8k(row: Fields) -> dict[str, Any]:
    solution, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise ValueError("the answer has no #### line")
    steps = solution.count("<<")
    return {
        "question": row["question"],
        "answer": answer.strip().replace(",", ""),
        "solution": remove_calculator_marks(solution).strip(),
        "kind": f"{min(steps, _MANY_STEPS)}{'+' if steps >= _MANY_STEPS else ''} steps",
    }


def _gsm_hard(row: Fields) -> dict[str, Any]:
    return {"question": row["input"], "answer": number_text(row["target"])}


def _gsm_plus(row: Fields) -> dict[str, Any]:
    """The perturbation "critical thinking" asks what cannot be answered: its answer is the text "None"."""
    if str(row["answer"]).strip().lower() == "none":
        raise ValueError(f"it has no answer ({row['perturbation_type']}): the question lacks what it would need")
    return {
        "question": row["question"],
        "answer": number_text(row["answer"]),
        "solution": remove_calculator_marks(row["solution"]).rpartition("####")[0].strip() or None,
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


SPECS = (
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
)
