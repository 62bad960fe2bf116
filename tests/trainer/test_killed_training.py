"""A training that is killed at any moment, and started again, ends as the one that never was: bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.trainer import killed
from trl_reasoning_distill.trainer.checkpoints import MANIFEST


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, store: Path) -> dict[str, tuple[dict, float]]:
    """What SFT and distillation end with when nothing happens to them, and how long that takes."""
    ends = {}
    for kind in ("sft", "kd"):
        output = tmp_path_factory.mktemp(kind)
        began = time.perf_counter()
        process = killed.start(output, store if kind == "kd" else None)
        process.join()
        assert process.exitcode == 0
        ends[kind] = (torch.load(output / killed.FINAL), time.perf_counter() - began)
    return ends


def assert_ends_alike(output: Path, expected: dict) -> None:
    found = torch.load(output / killed.FINAL)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    assert all(torch.equal(*pair) for pair in zip(found["optimizer"], expected["optimizer"], strict=True))
    assert found["coefficient"] == expected["coefficient"]
    assert found["tokens"] == expected["tokens"]
    assert found["log"][-1].keys() == expected["log"][-1].keys()
    assert [entry for entry in found["log"] if "loss" in entry] == [e for e in expected["log"] if "loss" in e]


def kill_and_finish(output: Path, store: Path | None, kills: int, generator: random.Random, seconds: float) -> int:
    """Kill a training so often, every other time while it saves; then let it end. How often a checkpoint was left incomplete."""
    caught = 0
    for number in range(kills):
        process = killed.start(output, store)
        if number % 2 == 0:
            caught += killed.kill_while_saving(process, output, MANIFEST)
        else:
            process.join(generator.uniform(0, seconds))
            if process.is_alive():
                killed.kill(process)
    process = killed.start(output, store)
    process.join()
    assert process.exitcode == 0
    return caught


@pytest.mark.parametrize("kind", ["sft", "kd"])
def test_killed_training_ends_as_if_it_were_not(
    uninterrupted: dict[str, tuple[dict, float]], store: Path, tmp_path: Path, kind: str
) -> None:
    expected, seconds = uninterrupted[kind]
    caught = kill_and_finish(tmp_path, store if kind == "kd" else None, 4, random.Random(kind), seconds)
    assert caught >= 1, "no kill fell into a save"
    assert_ends_alike(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "kd"])
def test_killed_many_times(
    uninterrupted: dict[str, tuple[dict, float]], store: Path, tmp_path: Path, kind: str
) -> None:
    expected, seconds = uninterrupted[kind]
    for run in range(4):
        generator = random.Random(f"{kind} {run}")
        kill_and_finish(tmp_path / str(run), store if kind == "kd" else None, 6, generator, seconds)
        assert_ends_alike(tmp_path / str(run), expected)
