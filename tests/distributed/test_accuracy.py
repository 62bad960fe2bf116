"""Ranks answer held-out problems together, find what one process finds, and go on training as if they had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.accuracy_worker import train
from tests.distributed.test_trainer import LAUNCHES, launch
from tests.trainer import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with room for the think tags, which are no tokens of it yet."""
    path = tmp_path_factory.mktemp("student")
    tiny.make_model().save_pretrained(path)
    tiny.make_tokenizer(think_tokens=False).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process measures, with and without an adapter."""
    return {kind: train(str(student), kind, tmp_path_factory.mktemp(kind))[0] for kind in ("full", "lora")}


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("full", "DDP"),
        ("lora", "DDP"),
        pytest.param("full", "ZERO3", marks=pytest.mark.slow),
        pytest.param("full", "FSDP", marks=pytest.mark.slow),
        pytest.param("lora", "FSDP", marks=pytest.mark.slow),
    ],
)
def test_ranks_find_what_one_process_finds(
    student: Path, alone: dict[str, dict[str, Any]], tmp_path: Path, kind: str, strategy: str
) -> None:
    expect = {"DDP": "MULTI_CPU", "ZERO3": "DEEPSPEED", "FSDP": "FSDP"}[strategy]
    folder = tmp_path / "two"
    ranks = launch(LAUNCHES[strategy], tmp_path, student, kind, folder, expect, script="accuracy_worker.py")
    assert len(ranks) == 2
    for name in ("answers", "accuracy"):
        assert ranks[0][name] == ranks[1][name] == alone[kind][name], name
    for name in ("loss", "eval_loss"):
        assert ranks[0][name] == pytest.approx(alone[kind][name], rel=1e-4), name
