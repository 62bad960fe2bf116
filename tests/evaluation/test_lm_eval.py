"""lm-eval on the same model and the same local problems: the same texts, and each difference of verdict has a known reason.

Needs `pip install lm-eval==0.4.13`, in this environment or in a folder on PYTHONPATH; nothing is fetched. Three rules are compared:

- ours: what follows the reasoning, compared as numbers;
- `flexible-extract`, as in lm-eval's gsm8k: the last number anywhere in the text, compared as text;
- `strict-match`: a number that is all that follows `</think>`, compared as text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.evaluation.evaluate import EvaluationConfig, evaluate_models
from trl_reasoning_distill.teacher.sampling import EngineArguments, SamplingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval==0.4.13"
    ),
]

MAX_NEW_TOKENS = 44  # cuts some of the longer chains
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
STRICT = r"</think>\s*(-?[0-9.,]+)\s*$"
TASK = f"""\
task: local_arithmetic
dataset_path: json
dataset_kwargs: {{data_files: {{test: problems.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: {MAX_NEW_TOKENS}}}
filter_list:
- name: strict-match
  filter: [{{function: regex, regex_pattern: '{STRICT}'}}, {{function: take_first}}]
- name: flexible-extract
  filter: [{{function: regex, group_select: -1, regex_pattern: '{FLEXIBLE}'}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
num_fewshot: 0
"""


def explain(rule: str, ours: dict[str, Any], theirs: str, gold: str) -> str | None:
    """Why lm-eval's verdict differs from ours; `None` if no known reason holds."""
    right = ours["status"] == "correct"
    if right and theirs != gold and float(theirs.replace(",", "").rstrip(".") or "nan") == float(gold):
        return "the same number is written in two ways, and lm-eval compares texts"
    if not right and theirs == gold and ours["rule"] == "unfinished_reasoning" and rule == "flexible-extract":
        return "the reasoning was cut, and its last number happens to be the answer"
    return None


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_each_difference_from_lm_eval_has_a_reason(tmp_path: Path, quickstart_models: Path, name: str) -> None:
    model = quickstart_models / name
    problems = load_problems("synthetic_arithmetic", split="test", limit=60, steps=[2, 3, 4])
    # Every third gold answer is written as a decimal, as some data sets have it.
    golds = {p.id: f"{p.answer}.0" if index % 3 == 0 else str(p.answer) for index, p in enumerate(problems)}
    problems = [Problem(p.id, p.question, golds[p.id], "local", kind=p.kind) for p in problems]
    write_jsonl(
        tmp_path / "problems.jsonl", ({"id": p.id, "question": p.question, "answer": p.answer} for p in problems)
    )
    (tmp_path / "local.yaml").write_text(TASK)

    theirs = run_lm_eval(model, tmp_path)
    config = EvaluationConfig(SamplingConfig(MAX_NEW_TOKENS), ReasoningFormat.preset("think", system_prompt=None))
    engine = EngineArguments(device="cpu")
    evaluate_models({name: str(model)}, problems, tmp_path / "ours", config=config, engine=engine, show_progress=False)
    ours = {row["problem_id"]: row for row in read_jsonl(tmp_path / "ours" / "predictions.jsonl")}

    same_text = [
        each for each in theirs if each["resps"][0][0].strip() == ours[each["doc"]["id"]]["completion"].strip()
    ]
    assert len(same_text) >= 0.97 * len(theirs), "greedy texts are equal, but for ties in floating point"
    reasons: Counter[str] = Counter()
    agreed = 0
    for each in same_text:
        own = ours[each["doc"]["id"]]
        if (own["status"] == "correct") == bool(each["exact_match"]):
            agreed += 1
            continue
        reason = explain(each["filter"], own, each["filtered_resps"][0], each["target"])
        assert reason is not None, (each["filter"], own, each["filtered_resps"], each["target"])
        reasons[reason] += 1
    print(f"{name}: {agreed} of {len(same_text)} verdicts agree; {dict(reasons)}")
    assert agreed + reasons.total() == len(same_text)
    assert reasons["the same number is written in two ways, and lm-eval compares texts"] > 0


def run_lm_eval(model: Path, folder: Path) -> list[dict[str, Any]]:
    """lm-eval's samples of the local task, of both filters."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "16"]
    command += [
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
        "local_arithmetic",
        "--include_path",
        ".",
    ]
    command += ["--apply_chat_template", "--log_samples", "--output_path", "theirs"]
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "theirs").rglob("samples_local_arithmetic_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {row["filter"] for row in rows} == {"strict-match", "flexible-extract"}
    return rows


def test_the_rules_here_are_those_of_lm_evals_gsm8k() -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    assert re.sub(r"\s", "", FLEXIBLE) in re.sub(r"[\s\"']", "", text)
