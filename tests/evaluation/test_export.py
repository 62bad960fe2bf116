"""Results as other harnesses write them: their files, their names, our numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from datasets import Dataset

from tests.evaluation.test_metrics import row
from trl_reasoning_distill.data.files import write_json, write_jsonl
from trl_reasoning_distill.evaluation.export import export_results
from trl_reasoning_distill.evaluation.metrics import summarize

SETTINGS = {"engine": "transformers", "temperature": 0.0, "max_new_tokens": 64, "limit": 3, "seed": 0}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    rows = [
        row(problem, 0, answer, question=f"What is {problem}?", prompt=[{"role": "user", "content": problem}])
        for problem, answer in (("a", "7"), ("b", "8"), ("c", "7"))
    ]
    both = [dataclasses.replace(each, model=name).to_row() for name in ("base", "org/model") for each in rows]
    write_jsonl(tmp_path / "predictions.jsonl", both)
    write_json(tmp_path / "metrics.json", {"models": {name: summarize(rows) for name in ("base", "org/model")}})
    return tmp_path


def test_lm_eval(evaluation: Path) -> None:
    paths = export_results("lm-eval", evaluation, "data/my task.jsonl", SETTINGS)
    assert [path.parent.name for path in paths] == ["base", "org__model"]
    results = json.loads(paths[0].read_text())
    task = results["results"]["my_task.jsonl"]
    assert task["verified,none"] == pytest.approx(2 / 3)
    assert task["verified_stderr,none"] == pytest.approx(math.sqrt(2 / 9 * 3 / 2 / 3))
    assert task["sample_len"] == 3
    (samples,) = paths[0].parent.glob("samples_my_task.jsonl_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert (first["doc"]["id"], first["target"], first["filtered_resps"], first["verified"]) == ("a", "7", ["7"], 1.0)
    assert first["resps"][0][0].endswith("7")


def test_lighteval(evaluation: Path) -> None:
    path, _ = export_results("lighteval", evaluation, "gsm8k_test", SETTINGS)
    assert path.relative_to(evaluation).parts[:4] == ("export", "lighteval", "results", "base")
    results = json.loads(path.read_text())
    assert results["results"]["gsm8k_test|0"] == results["results"]["all"]
    assert results["results"]["all"]["verified"] == pytest.approx(2 / 3)
    (details,) = (evaluation / "export" / "lighteval" / "details" / "base").glob("*/details_gsm8k_test|0_*.parquet")
    rows = Dataset.from_parquet(str(details), cache_dir=str(evaluation / "cache"))
    assert [each["metric"]["verified"] for each in rows] == [1.0, 0.0, 1.0]
    assert rows[1]["model_response"]["text_post_processed"] == ["8"]


def test_another_format_is_refused(evaluation: Path) -> None:
    with pytest.raises(ValueError, match="lm-eval, lighteval"):
        export_results("helm", evaluation, "x", SETTINGS)
