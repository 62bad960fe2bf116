"""Dot products of hidden states with a few rows of the head each, for CUDA: no copy of the rows is made.

Tested in Triton's interpreter on the CPU, and by the whole test suite of the losses with `-m gpu` where a GPU is at hand.
"""

# Triton reads the annotations of its kernels itself, and writes its constants in capitals.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_BLOCK = 1024


@triton.jit
def _dot_kernel(
    hidden_ptr,
    hidden_stride,
    weight_matrix_ptr,
    weight_stride,
    ids_ptr,
    products_ptr,
    entries,
    width,
    BLOCK: tl.constexpr,
):
    token, entry = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(ids_ptr + token * entries + entry)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < width
        hidden = tl.load(hidden_ptr + token * hidden_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_matrix_ptr + row * weight_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        total += hidden * weight
    tl.store(products_ptr + token * entries + entry, tl.sum(total, axis=0))


def named_products(
    weight: Float[Tensor, "vocab hidden"], hidden: Float[Tensor, "tokens hidden"], ids: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """`hidden[t] @ weight[ids[t, i]]` in float32."""
    products = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    _dot_kernel[ids.shape](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        ids.contiguous(),
        products,
        ids.shape[1],
        hidden.shape[1],
        BLOCK=min(_BLOCK, triton.next_power_of_2(hidden.shape[1])),
        num_warps=4,
    )
    return products
