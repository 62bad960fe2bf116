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
    assert done.stdout.split() == ["rows", "loss"]


def check_rows() -> None:
    from trl_reasoning_distill.losses import _rows, _triton_rows

    torch.manual_seed(0)
    for dtype, vocab in ((torch.float32, 4097), (torch.bfloat16, 9000), (torch.float32, 3)):
        logits = (3 * torch.randn(5, vocab)).to(dtype)
        logits[0, :2] = 12.0  # a tie: the first counts
        logits[1] = -1e4  # a row of which nothing is left
        rival = logits.float().amax(-1)
        rival[2] -= 1
        weights = torch.randn(2, 5)
        for temperature in (1.0, 2.0, 0.7):
            expected = _rows.row_statistics(logits, temperature, rival)
            actual = _triton_rows.row_statistics(logits, temperature, rival)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            for softcap in (None, 15.0):
                arguments = (weights[0], None if temperature == 1.0 else weights[1], temperature, 0.5, softcap)
                gradient, other = logits.clone(), logits.clone()
                _rows.row_gradient_(gradient, expected, *arguments)
                _triton_rows.row_gradient_(other, expected, *arguments)
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(other, gradient, rtol=tolerance, atol=1e-7)
    print("rows")


def check_loss() -> None:
    from tests.losses.cases import live_teacher, problem
    from trl_reasoning_distill.losses import _fused_head, _triton_rows

    for settings in ({"temperature": 2.0, "divergence": "jsd"}, {"temperature": 1.5, "logit_softcap": 4.0}, {}):
        for teacher in ({}, {"teacher": live_teacher(top_k=3)}, {"teacher": live_teacher(top_k=None)}):
            case = dataclasses.replace(problem(chunk_size=4, **settings), **teacher)
            expected, expected_grads = case.run(torch.float32)
            with unittest.mock.patch.object(_fused_head, "_row_kernels", return_value=_triton_rows):
                actual, actual_grads = case.run(torch.float32)
            torch.testing.assert_close(actual.loss, expected.loss)
            torch.testing.assert_close(actual_grads, expected_grads)
    print("loss")


if __name__ == "__main__":
    check_rows()
    check_loss()
