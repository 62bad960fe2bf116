"""Products of 16-bit matrices whose result is float32: what cuBLAS can write, and elsewhere by blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows or columns of the large side (the vocabulary) at a time, where a product is made in another dtype first.
_BLOCK = 8192
# Elements of the head's rows that are gathered at a time.
_CPU_GATHERED, _ACCELERATOR_GATHERED = 2**20, 2**25
# `mm` takes `out_dtype` since torch 2.8, `addmm` since 2.11.
_ADDS_IN_FLOAT32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k vocab"]) -> Float[Tensor, "n vocab"]:
    """`a @ b` in float32, exact products of 16-bit numbers summed and kept in float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    result = torch.empty(len(a), b.shape[1], dtype=torch.float32, device=a.device)
    a = a.float()
    for start in range(0, b.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        result[:, columns] = a @ b[:, columns].float()
    return result


def named_products(
    weight: Float[Tensor, "vocab hidden"], hidden: Float[Tensor, "tokens hidden"], ids: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """`hidden[t] @ weight[ids[t, i]]` in float32, from copies of the rows of some tokens at a time."""
    named = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    budget = _CPU_GATHERED if hidden.device.type == "cpu" else _ACCELERATOR_GATHERED
    step = max(1, budget // (ids.shape[1] * hidden.shape[1]))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        torch.bmm(weight[ids[rows]].float(), hidden[rows, :, None].float(), out=named[rows, :, None])
    return named


def add_product_(total: Float[Tensor, "vocab k"], a: Float[Tensor, "vocab n"], b: Float[Tensor, "n k"]) -> None:
    """`total += a @ b`, where `total` is float32 and the others have 16 bits."""
    if total.device.type == "cuda" and _ADDS_IN_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(total), _BLOCK):
        rows = slice(start, start + _BLOCK)
        if total.device.type == "cuda":
            total[rows] += torch.mm(a[rows], b, out_dtype=total.dtype)
        elif a.dtype == torch.float16:  # a sum over many tokens may not fit in it
            total[rows] += torch.mm(a[rows].float(), b.float())
        else:
            total[rows] += torch.mm(a[rows], b)
