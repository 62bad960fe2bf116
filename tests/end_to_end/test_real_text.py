"""Real pretrained models on real GSM8K problems, from generation to evaluation: what must hold whatever the models can do.

The default suite walks with stories260K, a Llama of 0.26 M parameters that was pretrained on children's stories; its answers
to word problems are nonsense, and every verdict still has to be right. The slow suite walks with SmolLM2-135M-Instruct and its
own chat template.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.end_to_end import road as roads
from tests.end_to_end.road import Road, bucketed_kl, dense_log_probs, load, walk
from trl_reasoning_distill.data.files import read_json, read_jsonl
from trl_reasoning_distill.data.manifest import read_manifest
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import load_problems
from trl_reasoning_distill.teacher.store.codec import STEP_LIMIT
from trl_reasoning_distill.verification.extract import extract_answer

pytestmark = pytest.mark.timeout(1800)  # the first test of each model waits for all of its stages

# ChatML in the special tokens that this tokenizer has.
STORIES_TEMPLATE = (
    "{%- for message in messages -%}{{- bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- bos_token + 'assistant\n' -}}{%- endif -%}"
)


@pytest.fixture(scope="module", params=["stories260K", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def road(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Road:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "SmolLM2":
        teacher, student = smollm2()
        problems = shortest_problems(shared_data, 4)
        return walk(folder, teacher, student, problems, max_new_tokens=48, steps=3, learning_rate=1e-4)
    teacher, student = stories(shared_data, folder)
    problems = shortest_problems(shared_data, 8)
    return walk(folder, teacher, student, problems, max_new_tokens=24, steps=4, learning_rate=5e-4)


def smollm2() -> tuple[Path, Path]:
    """Teacher and pruned student in the folder that `TRD_MODELS` names."""
    folder = Path(os.environ.get("TRD_MODELS", ""))
    paths = folder / "SmolLM2-135M-Instruct", folder / "SmolLM2-pruned-L20"
    if not all((path / "config.json").is_file() for path in paths):
        pytest.skip(
            f"TRD_MODELS must name a folder with {paths[0].name} and {paths[1].name}; "
            "shared/tools/get_models.sh beside the checkout makes one"
        )
    return paths


def stories(shared_data: Path, folder: Path) -> tuple[Path, Path]:
    """stories260K with a chat template, and a student that lacks one of its layers."""
    source = shared_data / "models" / "stories260K"
    if not source.is_dir():
        pytest.skip(f"no pretrained model at {source}")
    tokenizer = AutoTokenizer.from_pretrained(source, pad_token="<unk>")
    tokenizer.chat_template = STORIES_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(source)
    teacher, student = folder / "teacher", folder / "student"
    for path in (teacher, student):
        tokenizer.save_pretrained(path)
    model.save_pretrained(teacher)
    model.model.layers = nn.ModuleList([layer for index, layer in enumerate(model.model.layers) if index != 2])
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(student)
    return teacher, student


def shortest_problems(shared_data: Path, count: int) -> list[Problem]:
    """Short enough that question and solution fit a context of 512 tokens of stories260K."""
    problems = load_problems("gsm8k", split="train", data_dir=str(shared_data))
    return sorted(problems, key=lambda problem: len(problem.question + str(problem.solution)))[:count]


@pytest.fixture(scope="module")
def gold(shared_data: Path) -> Mapping[str, Decimal]:
    """GSM8K's answers by question, as they stand after `####` in its own file."""
    rows = read_jsonl(shared_data / "gsm8k" / "train.jsonl")
    return {row["question"]: Decimal(row["answer"].split("####")[1].strip().replace(",", "")) for row in rows}


@pytest.fixture(scope="module")
def models(road: Road) -> Mapping[str, PreTrainedModel]:
    return {"teacher": load(road.teacher), "student": load(road.student), "distilled": load(road.distilled)}


def is_right(text: str, gold: Decimal) -> bool:
    """Whether the number in the answer is GSM8K's."""
    number = re.search(r"-?\d[\d,]*(?:\.\d+)?", extract_answer(text).answer or "")
    return number is not None and Decimal(number.group().replace(",", "")) == gold


def test_the_teacher_answers_every_problem_in_its_own_template(road: Road) -> None:
    traces = road.rows("generate/traces.jsonl")
    assert [trace["problem_id"] for trace in traces] == [problem.id for problem in road.problems]
    assert all(trace["completion"].strip() and trace["num_tokens"] for trace in traces)
    tokenizer = road.tokenizer
    for trained, stored in zip(road.rows("verify/train.jsonl"), road.store, strict=True):
        prompt = tokenizer.apply_chat_template(trained["prompt"], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(trained["prompt"] + trained["completion"], tokenize=False)
        assert stored.input_ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt_length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert (stored.labels != -100).tolist() == [t >= prompt_length for t in range(len(stored.labels))]


def test_verdicts_equal_the_answers_of_gsm8k(road: Road, gold: Mapping[str, Decimal]) -> None:
    verdicts = road.rows("verify/verdicts.jsonl")
    assert len(verdicts) == 2 * len(road.problems)
    assert {row["status"] for row in verdicts if row["model"] == roads.GOLD} == {"correct"}
    question = {problem.id: problem.question for problem in road.problems}
    answers = [(row["completion"], question[row["problem_id"]], row["status"]) for row in verdicts]
    predictions = road.rows("evaluate/predictions.jsonl")
    assert len(predictions) == 3 * len(road.problems)
    answers += [(row["completion"], question[row["problem_id"]], row["status"]) for row in predictions]
    for text, asked, status in answers:
        assert status == ("correct" if is_right(text, gold[asked]) else "incorrect"), text
    metrics = read_json(road.folder / "evaluate" / "metrics.json")
    for name, model in metrics["models"].items():
        right = sum(row["status"] == "correct" for row in predictions if row["model"] == name)
        assert model["correct"] == right


def test_rows_are_gsm8ks_own_solutions(road: Road) -> None:
    rows = road.rows("verify/train.jsonl")
    assert [row["problem_id"] for row in rows] == [problem.id for problem in road.problems]
    for row, problem in zip(rows, road.problems, strict=True):
        assert row["completion"][0]["content"] == f"{problem.solution}\n#### {problem.answer}"
        assert row["prompt"][-1]["content"] == problem.question


def test_the_store_equals_the_dense_model(road: Road, models: Mapping[str, PreTrainedModel]) -> None:
    store = road.store
    assert (store.rows, store.top_k) == (len(road.problems), roads.TOP_M)
    assert len(store) == sum(row.count for row in store)
    for row in store:
        records = store.read(range(row.offset, row.offset + row.count))
        ids = torch.from_numpy(records.ids).long()
        for temperature in (1.0, roads.TEMPERATURE):
            dense = dense_log_probs(models["teacher"], row, temperature)
            stored = torch.from_numpy(records.at_temperature(temperature)).double()
            # The ids are the most likely ones; two that are equal to float32 may swap places.
            torch.testing.assert_close(dense.gather(-1, ids), dense.topk(roads.TOP_M).values, rtol=0, atol=1e-4)
            # The codec rounds each log-prob by at most half a step, on top of the mass of all.
            torch.testing.assert_close(stored, dense.gather(-1, ids), rtol=0, atol=STEP_LIMIT)
            assert (stored.exp().sum(-1) - dense.gather(-1, ids).exp().sum(-1)).abs().max() < 1e-4
            rounding = bucketed_kl(dense, dense.scatter(-1, ids, stored), ids)
            assert rounding.mean() < 1e-5
    assert np.all(store.read(range(len(store))).ids < models["teacher"].config.vocab_size)


def test_the_kd_loss_is_the_definition_and_falls_on_a_fixed_batch(
    road: Road, models: Mapping[str, PreTrainedModel]
) -> None:
    history = json.loads((road.folder / "distill" / "trainer_state.json").read_text())["log_history"]
    logged = [entry["kd_loss"] for entry in history if "kd_loss" in entry]  # every step's batch is all rows
    assert len(logged) == road.steps
    assert logged[-1] < logged[0]
    sparse, before, after = [], [], []
    for row in road.store:
        teacher, student, distilled = (dense_log_probs(models[name], row, roads.TEMPERATURE) for name in models)
        ids = teacher.topk(roads.TOP_K).indices
        sparse.append(bucketed_kl(teacher, student, ids))
        before.append((teacher.exp() * (teacher - student)).sum(-1))
        after.append((teacher.exp() * (teacher - distilled)).sum(-1))
    assert logged[0] == pytest.approx(roads.TEMPERATURE**2 * torch.cat(sparse).mean().item(), rel=1e-2)
    assert torch.cat(after).mean() < torch.cat(before).mean()  # over the whole vocabulary too
    manifest = read_manifest(road.folder / "distill")
    assert manifest.counts["steps"] == road.steps
    assert manifest.counts["supervised_tokens_seen"] == road.steps * len(road.store)
