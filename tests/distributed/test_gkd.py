"""A live teacher on one rank and on two, with real processes: loss, gradient norm and weights, on the dataset's text and on the student's own.

TRL's own GKD 1.16 gives half the loss and gradient on two ranks of what it gives on one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.gkd_worker import train
from tests.distributed.test_trainer import LAUNCHES, launch
from tests.trainer import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

# On its own text, written greedily or with the row's own random numbers, and fine-tuned on the rest
MIXED = {"lmbda": 0.5, "seed": 1, "sft_weight": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher with more rows in its embedding, on disk."""
    folder, tokenizer = tmp_path_factory.mktemp("gkd"), tiny.make_tokenizer()
    tiny.make_model().save_pretrained(folder / "student")
    tiny.make_model(7, vocab_size=272).save_pretrained(folder / "teacher")
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def compare(kind: str, models: tuple[Path, Path], tmp_path: Path, **options: Any) -> dict[str, Any]:
    one = train(str(models[0]), str(models[1]), tmp_path / "one", **options)
    expect = {"DDP": "MULTI_CPU", "ZERO2": "DEEPSPEED", "ZERO3": "DEEPSPEED"}.get(kind, "FSDP")
    words = [f"expect={expect}", *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    two = launch(LAUNCHES[kind], tmp_path, *models, tmp_path / "two", *words, script="gkd_worker.py")
    for name in ("loss", "grad_norm", "sft_loss", "kd_loss", "teacher_mass", "top1_agreement"):
        assert two[name] == pytest.approx(one[name], rel=5e-5, abs=1e-7), name
    for name in ("num_tokens", "supervised_tokens", "on_policy_share", "completion_length", "truncated_share"):
        assert two[name] == one[name], name
    file = "adapter_model.safetensors" if options.get("lora") else "model.safetensors"
    first, second = (load_file(tmp_path / run / "final_model" / file) for run in ("one", "two"))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-5)
    return two


@pytest.mark.parametrize("options", [{}, MIXED], ids=["given text", "written text too"])
def test_ddp(models: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    result = compare("DDP", models, tmp_path, **options)
    if options:
        assert 0 < sum(result["on_policy_share"]) < 2, "one step of each kind"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZERO2", "ZERO3", "FSDP"])
@pytest.mark.parametrize("options", [{}, MIXED], ids=["given text", "written text too"])
def test_sharded(models: tuple[Path, Path], tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    result = compare(kind, models, tmp_path, **options)
    assert result["teacher_is_sharded"] == (kind != "ZERO2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "ZERO3", "FSDP"])
def test_the_former_self_with_a_better_prompt(models: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    compare(kind, models, tmp_path, itself=True, lora=True, teacher_context="few_shot", **MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZERO3", "FSDP"])
def test_a_teacher_that_is_sharded_writes(models: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    compare(kind, models, tmp_path, seq_kd=True, sft_weight=1.0)
