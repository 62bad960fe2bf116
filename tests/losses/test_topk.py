"""Top-K in two stages is Top-K."""

from __future__ import annotations

import pytest
import torch

from trl_reasoning_distill.losses.topk import exact_top_k


@pytest.mark.parametrize(("width", "k"), [(1000, 7), (4096, 25), (5000, 25), (5001, 1), (40, 40)])
def test_two_stage_top_k_is_exact(device, width, k):
    logits = torch.randn(50, width, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0, -k:] += 10  # in the columns that fill no block
    values, ids = exact_top_k(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(ids, logits.topk(k).indices)
