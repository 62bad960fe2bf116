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
    assert done.stdout.split() == ["rows", "tiles", "gather", "loss"]


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


def check_gather() -> None:
    from trl_reasoning_distill.losses import _matmul, _triton_gather

    torch.manual_seed(0)
    for width in (5, 1024, 1500):
        for dtype in (torch.float32, torch.bfloat16):
            weight, hidden = torch.randn(40, width).to(dtype), torch.randn(7, 2 * width).to(dtype)[:, :width]
            ids = torch.randint(40, (7, 3))
            expected = _matmul.named_products(weight, hidden, ids)
            torch.testing.assert_close(
                _triton_gather.named_products(weight, hidden, ids), expected, rtol=1e-5, atol=1e-4
            )
    print("gather")


def loss_cases():
    """Each divergence and support with each kind of targets, at temperatures below, at and above 1."""
    from tests.losses.cases import live_teacher, problem
    from trl_reasoning_distill.losses.divergence import TopKTargets

    divergences = [{"divergence": "jsd", "beta": beta} for beta in (0.3, 1.0)] + [{"divergence": "reverse_kl"}, {}]
    for divergence in (*divergences, {"support": "renormalized"}, {"top_p": 0.5}):
        for temperature in (1.0, 2.0, *((0.7,) if divergence.get("beta") == 0.3 else ())):
            settings = {"temperature": temperature, "chunk_size": 4, **divergence}
            case = problem(**settings)
            if temperature == 0.7:
                case.settings["logit_softcap"] = 4.0
            yield case  # with a linear reference
            case = dataclasses.replace(case, reference=None)
            yield case
            ids = case.teacher.ids.clone()
            ids[0], ids[2, 1] = -1, -1
            holes = TopKTargets(ids, case.teacher.log_probs)
            yield dataclasses.replace(case, teacher=holes)
            everything = problem(k=7, vocab=7, **settings)
            yield dataclasses.replace(everything, reference=None)
            yield dataclasses.replace(case, teacher=None)
            top_p = {"top_p": 1.0, "support": settings.get("support", "tail")}
            yield dataclasses.replace(case, teacher=live_teacher(top_k=3), settings=case.settings | top_p)
            yield dataclasses.replace(
                case, teacher=live_teacher(top_k=3, vocab_size=11), settings=case.settings | top_p
            )
            yield dataclasses.replace(case, teacher=live_teacher(top_k=None), settings=case.settings | {"top_p": 1.0})


def check_loss() -> None:
    from trl_reasoning_distill.losses import _kernels, _triton_gather, _triton_rows, _triton_tiles, _triton_tokens

    kernels = {"gather": _triton_gather, "rows": _triton_rows, "tiles": _triton_tiles, "tokens": _triton_tokens}
    covered = []

    def is_covered(*arguments):
        covered.append(_is_covered(*arguments))
        return covered[-1]

    _is_covered, _triton_tokens.is_covered = _triton_tokens.is_covered, is_covered
    for case in loss_cases():
        expected, expected_grads = case.run(torch.float32)
        with unittest.mock.patch.object(_kernels, "kernels", lambda kind, *_: kernels[kind]):
            actual, actual_grads = case.run(torch.float32)
        for field in dataclasses.fields(actual):
            ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
            torch.testing.assert_close(
                ours, theirs, rtol=2e-5, atol=2e-6, msg=lambda m, n=field.name, c=case: f"{n} {c.settings} {m}"
            )
        torch.testing.assert_close(
            actual_grads, expected_grads, rtol=1e-4, atol=5e-6, msg=lambda m, c=case: f"{c.settings} {m}"
        )
    assert 0.3 < sum(covered) / len(covered) < 0.95
    print("loss")


if __name__ == "__main__":
    check_rows()
    check_tiles()
    check_gather()
    check_loss()
