"""The CUDA kernels in Triton's interpreter on the CPU: the same arithmetic as the torch path, without a GPU.

The interpreter must be chosen before Triton is imported, so it runs in a process of its own. `pytest -m gpu` runs the
compiled kernels, through all other tests of this room.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, and without it its kernels cannot run")


def test_the_kernels_agree_with_torch_in_the_interpreter(repository: Path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["rows", "tiles", "loss"]


def check_rows() -> None:
    from trl_reasoning_distill.losses import _rows, _triton_rows

    torch.manual_seed(0)
    for dtype, vocab in ((torch.float32, 4097), (torch.bfloat16, 9000), (torch.float32, 3)):
        logits = (3 * torch.randn(5, vocab)).to(dtype)
        logits[0, :2] = 12.0  # a tie: the first counts
        logits[1] = -1e4  # a row of which nothing is left
        logits[3, :-1] = -torch.inf  # whole blocks of tokens that a bias removes
        logits[4] = -torch.inf
        capped = logits.clone()
        capped[3:] = 1.0  # no logit under a soft-cap is infinite
        rival = logits.float().amax(-1)
        rival[2] -= 1
        weights = torch.randn(2, 5)
        for temperature in (1.0, 2.0, 0.7):
            expected = _rows.row_statistics(logits, temperature, rival)
            actual = _triton_rows.row_statistics(logits, temperature, rival)
            for ours, theirs in zip(actual, expected, strict=True):
                assert ours.isfinite().all()
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            for softcap in (None, 15.0):
                arguments = (weights[0], None if temperature == 1.0 else weights[1], temperature, 0.5, softcap)
                tile = logits if softcap is None else capped
                gradient, other = tile.clone(), tile.clone()
                _rows.row_gradient_(gradient, expected, *arguments)
                _triton_rows.row_gradient_(other, expected, *arguments)
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(other, gradient, rtol=tolerance, atol=1e-7)
    print("rows")


def check_tiles() -> None:
    from trl_reasoning_distill.losses import _tiles, _triton_tiles

    torch.manual_seed(0)
    for vocab in (4100, 5):
        student, other = 2 * torch.randn(6, vocab), 2 * torch.randn(6, vocab + 3)
        other = other[:, :vocab]  # the rows of a wider matrix
        other[0] = student[0]  # no distance
        student[1, 1:] = -torch.inf
        other[2, : vocab // 2 + 1] = -torch.inf
        student[3, :2] = 9.0  # of equals the first is compared
        other[3, 0] = 9.0
        weight = torch.randn(6)
        for divergence, beta in (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 1.0)):
            for temperature, scale, softcap in ((1.0, 1.0, None), (2.0, 0.5, 30.0), (0.7, 2.0, None)):
                for given in (weight, None):
                    arguments = (given, divergence, beta, temperature, scale, softcap)
                    tiles = other.clone(), other.clone()
                    logits = student.clamp_min(-29.0) if softcap else student
                    expected = _tiles.dense_divergence_(tiles[0], logits, *arguments)
                    actual = _triton_tiles.dense_divergence_(tiles[1], logits, *arguments)
                    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)
                    torch.testing.assert_close(tiles[1], tiles[0], rtol=1e-4, atol=2e-5)
    print("tiles")


def check_loss() -> None:
    from tests.losses.cases import live_teacher, problem
    from trl_reasoning_distill.losses import _fused_head, _triton_rows, _triton_tiles

    kernels = {"rows": _triton_rows, "tiles": _triton_tiles}
    for settings in ({"temperature": 2.0, "divergence": "jsd"}, {"temperature": 1.5, "logit_softcap": 4.0}, {}):
        for teacher in ({}, {"teacher": live_teacher(top_k=3)}, {"teacher": live_teacher(top_k=None)}):
            case = dataclasses.replace(problem(chunk_size=4, **settings), **teacher)
            expected, expected_grads = case.run(torch.float32)
            with unittest.mock.patch.object(_fused_head, "_kernels", lambda kind, *_: kernels[kind]):
                actual, actual_grads = case.run(torch.float32)
            torch.testing.assert_close(actual.loss, expected.loss)
            torch.testing.assert_close(actual_grads, expected_grads)
    print("loss")


if __name__ == "__main__":
    check_rows()
    check_tiles()
    check_loss()
