"""Two processes are one: losses, gradient norms and weights at the same global batch, under DDP, ZeRO-2, ZeRO-3 and FSDP2.

One launch per backend trains all cells that the selected tests ask for. TRL's own GKD 1.16 gives half the loss and gradient on two ranks of
what it gives on one.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.cells import CELLS, largest_differences, load_weights, make_material, train
from tests.distributed.launching import launch
from trl_reasoning_distill.trainer.checkpoints import MANIFEST, CheckpointError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # DeepSpeed compiles at its first start

BACKENDS = ("ddp", "zero2", "zero3", "fsdp2")
DEFAULT = ("full-kd", "lora-kl", "tied-gkd", "accuracy")  # what the default suite runs of the matrix, under DDP
TOLERANCE = 1e-6
NEEDS_CUDA = ("accuracy-lora", "zero3")  # PEFT 0.21 gathers an adapter's token rows on "cuda"

Results = Callable[[str, str], Path]


def _cases() -> list[object]:
    return [
        pytest.param(
            cell,
            backend,
            marks=() if backend == "ddp" and cell in DEFAULT else pytest.mark.slow,
            id=f"{cell}-{backend}",
        )
        for backend in BACKENDS
        for cell in CELLS
        if (cell, backend) != NEEDS_CUDA
    ]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a cell in this process, once; the folder of its result."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def result(cell: str) -> Path:
        train(CELLS[cell], material, folder / cell)
        return folder / cell

    return result


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The folder of a cell's result on two processes of a backend, which trains all selected cells in one launch."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    tests = [item.callspec.params for item in here]

    @functools.cache
    def run(backend: str) -> Path:
        folder = tmp_path_factory.mktemp(backend)
        cells = dict.fromkeys(params.get("cell", "saved") for params in tests if params["backend"] == backend)
        launch(backend, folder, {"cells": list(cells), "material": material})
        return folder

    return lambda cell, backend: run(backend) / cell


@pytest.mark.parametrize(("cell", "backend"), _cases())
def test_two_processes_are_one(
    cell: str, backend: str, alone: Callable[[str], Path], together: Results, record_property: Callable[..., None]
) -> None:
    two = together(cell, backend)
    differences = largest_differences(alone(cell), two)
    for name, value in (("cell", cell), ("backend", backend), ("differences", differences)):
        record_property(name, value)
    assert max(differences) <= TOLERANCE
    assert not list(two.glob(".final_model*")), "nothing half-written is left"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_is_bitwise(backend: str, material: Path, together: Results, tmp_path: Path) -> None:
    """In new processes, and from the checkpoint before when the newest lost its manifest, as a kill leaves it."""
    whole = together("saved", backend)
    run = shutil.copytree(whole, tmp_path / "saved")
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="distributed type was"):
        train(CELLS["saved"], material, run)
    launch(backend, tmp_path, {"cells": ["saved"], "material": material})
    assert largest_differences(whole, run) == (0.0, 0.0)
    before, after = load_weights(whole / "final_model"), load_weights(run / "final_model")
    assert all(after[name].equal(weight) for name, weight in before.items())


@pytest.mark.slow
def test_a_head_that_is_a_shard_group_of_its_own(alone: Callable[[str], Path], material: Path, tmp_path: Path) -> None:
    """Its weight is then a DTensor in the forward of the whole model."""
    words = ("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer,Linear")
    launch("fsdp2", tmp_path, {"cells": ["full-kd", "full-kl"], "material": material}, *words)
    for cell in ("full-kd", "full-kl"):
        assert max(largest_differences(alone(cell), tmp_path / cell)) <= TOLERANCE
