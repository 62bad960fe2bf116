"""Products in float32 of 16-bit matrices: the same by every way that a device or a version of torch allows."""

from __future__ import annotations

import pytest
import torch

from trl_reasoning_distill.losses import _matmul


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_float32(device, dtype, monkeypatch):
    monkeypatch.setattr(_matmul, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype).to(device) for shape in ((5, 16), (16, 23)))
    exact = a.double() @ b.double()
    torch.testing.assert_close(_matmul.product(a, b).double(), exact, rtol=1e-6, atol=1e-5)
    assert _matmul.product(a, b).dtype == torch.float32


@pytest.mark.parametrize("adds_in_float32", [True, False])
def test_sums_are_kept_in_float32(device, adds_in_float32, monkeypatch):
    """`addmm` writes float32 since torch 2.11; before, a block at a time is made and added."""
    if adds_in_float32 and not _matmul._ADDS_IN_FLOAT32:
        pytest.skip("this torch does not")
    monkeypatch.setattr(_matmul, "_ADDS_IN_FLOAT32", adds_in_float32)
    monkeypatch.setattr(_matmul, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16().to(device) for shape in ((23, 16), (16, 5)))
    total = torch.full((23, 5), 1000.0, device=device)
    _matmul.add_product_(total, a, b)
    torch.testing.assert_close(total.double() - 1000, a.double() @ b.double(), rtol=1e-2, atol=2e-2)


def test_the_sum_over_many_tokens_does_not_overflow_float16(device):
    ones = torch.ones(4, 4096, dtype=torch.float16, device=device)
    total = torch.zeros(4, 3, device=device)
    _matmul.add_product_(total, 16 * ones, 16 * torch.ones(4096, 3, dtype=torch.float16, device=device))
    assert torch.equal(total, torch.full_like(total, 256.0 * 4096))
