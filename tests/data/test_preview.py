"""The table counts right, the chart's bins hold every row, and long runs are measured on a sample."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.mixture import worked_rows
from trl_reasoning_distill.data.preview import make_preview, problem_item, row_item
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.data.tokenization import tokenize_example


def test_counts_by_source(shared_data: Path) -> None:
    problems = [
        *load_problems("gsm8k", limit=60, data_dir=str(shared_data)),
        *load_problems("svamp", limit=40, data_dir=str(shared_data)),
    ]
    text = make_preview([problem_item(each) for each in problems]).to_text()
    table = {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isalpha()}
    assert [table[name][1] for name in ("gsm8k", "svamp", "all")] == ["60", "40", "100"]
    assert [table[name][4] for name in ("gsm8k", "svamp", "all")] == ["60", "0", "60"]
    assert "characters in all" in text
    assert "── svamp ──" in text
    assert sum(int(count.replace(",", "")) for count in re.findall(r"│\S* ([\d,]+)", text)) == 100


def test_lengths_are_those_of_the_training(quickstart_models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart_models / "student")
    problems = load_problems("synthetic_arithmetic", limit=30)
    rows, _ = worked_rows(problems, ReasoningFormat.preset("think"))
    preview = make_preview([row_item(row) for row in rows], tokenizer, max_length=90)
    true = [len(tokenize_example(tokenizer, row).input_ids) for row in rows]
    assert preview.lengths.tolist() == true
    assert f"{np.mean(np.array(true) <= 90):.1%}" in preview.table()
    assert "← 90" in preview.chart()


def test_many_rows_are_measured_on_a_sample_and_that_is_said() -> None:
    items = [problem_item(Problem(str(i), "q" * (i % 50 + 1), "1", "s")) for i in range(500)]
    preview = make_preview(items, max_measured=100)
    assert (len(preview.lengths), len(preview.items)) == (100, 500)
    assert "of 100 rows drawn at random" in preview.table()
    assert preview.measured == make_preview(items, max_measured=100).measured


@pytest.mark.parametrize("lengths", [[5], [5, 5], [1, 1000], list(range(1, 300)), [1] * 200 + [10_000]])
def test_every_row_is_in_a_bin(lengths: list[int]) -> None:
    preview = make_preview([problem_item(Problem(str(i), "q" * n, None, "s")) for i, n in enumerate(lengths)])
    counts, edges = preview._bins(12)
    assert counts.sum() == len(lengths)
    assert (np.diff(edges) > 0).all()
    assert preview.chart().count("│") == 12


def test_the_picture_and_rows_of_other_shapes(tmp_path: Path) -> None:
    preview = make_preview([row_item({"prompt": "q", "completion": "c"})] * 3)
    preview.plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert make_preview([]).to_text().startswith("source")
    with pytest.raises(ValueError, match="needs `prompt` and `completion`"):
        row_item({"input_ids": [1]})
