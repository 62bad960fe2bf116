"""Top-K over a vocabulary without sorting it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_BLOCK = 64


def exact_top_k(
    logits: Float[Tensor, "tokens vocab"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest of each row, largest first, without sorting the row.

    The k blocks with the largest maxima hold the k largest values: a value outside of them is no larger than k maxima.

    Args:
        logits: `(tokens, vocab)`.
        k: How many, at most the vocabulary.

    Returns:
        Values and indices, `(tokens, k)`.
    """
    rows, width = logits.shape
    blocks = width // _BLOCK
    if blocks <= 2 * k:
        return logits.topk(k, dim=-1)
    blocked = logits[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    best = blocked.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    inside = torch.arange(_BLOCK, device=logits.device)
    candidates = torch.cat(
        [
            (best[:, :, None] * _BLOCK + inside).flatten(1),
            torch.arange(blocks * _BLOCK, width, device=logits.device).expand(rows, -1),
        ],
        dim=1,
    )
    values, places = logits.gather(1, candidates).topk(k, dim=-1)
    return values, candidates.gather(1, places)
