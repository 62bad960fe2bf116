"""What the loss would launch on a GPU, and how much of the vocabulary's tiles it would move: counted without one, so that neither grows unseen.

Triton's kernels are replaced by stand-ins that count as one launch and say what they read and write; everything else is counted as torch
dispatches it. On paper each launch costs 3 to 10 µs, and moving a tile of 8,192 × 151,936 logits in bfloat16 half a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_reasoning_distill.losses import _fused_head, _kernels, _matmul
from trl_reasoning_distill.losses._rows import RowStatistics
from trl_reasoning_distill.losses._tokens import TokenGradients, TokenValues
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearReference, LinearTeacher, fused_linear_distillation_loss

TOKENS, CHUNK, WIDTH, VOCAB, K = 64, 16, 24, 500, 25
# They touch a few entries of a row.
SPARSE = {"index_put_", "index_put", "_index_put_impl_", "gather", "scatter"}
# They make a tensor from another's memory, or memory without anything in it: nothing is launched.
NO_LAUNCH = {
    *(
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "squeeze",
        "t",
        "transpose",
    ),
    *("unbind", "unsqueeze", "view", "_unsafe_view", "split_with_sizes", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Counter(TorchDispatchMode):
    """Launches, and bytes of tensors as wide as the vocabulary that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.tile_bytes = 0

    def count(self, tensors: Iterable[Any]) -> None:
        self.launches += 1
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.shape == (CHUNK, VOCAB):
                self.tile_bytes += tensor.numel() * tensor.element_size()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in SPARSE:
            self.count([])
        elif function.overloadpacket.__name__ not in NO_LAUNCH:
            # What is changed in place is read and written, what is copied into or given as `out` is written alone.
            name, changes = function.overloadpacket.__name__, function._schema.is_mutable
            written = [args[0]] if changes and name != "copy_" and "out" not in (kwargs or {}) else []
            written += [] if changes else tree_leaves(result)
            self.count([*tree_leaves(args), *tree_leaves(kwargs or {}), *written])
        return result


class StandIns:
    """The kernels' functions: one launch each, the right shapes, nothing computed."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def kernels(self, kind: str, *_: Any) -> StandIns:
        return self

    def is_covered(self, targets: Any, padding: Any, settings: Any, dense: Any) -> bool:
        return all(term is None for term in dense)

    def named_products(self, weight: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self.counter.count([])
        return torch.empty(ids.shape)

    def row_statistics(self, logits: torch.Tensor, *_: Any) -> RowStatistics:
        self.counter.count([logits])
        rows = [torch.empty(len(logits)) for _ in range(4)]
        return RowStatistics(rows[0], torch.empty(len(logits), dtype=torch.long), *rows[1:])

    def row_gradient_(self, logits: torch.Tensor, *_: Any) -> None:
        self.counter.count([logits, logits])

    def token_losses(self, z: torch.Tensor, *_: Any) -> tuple[TokenValues, TokenGradients]:
        self.counter.count([])
        floats = [torch.empty(len(z)) for _ in range(5)]
        flags = [torch.empty(len(z), dtype=torch.bool) for _ in range(2)]
        values = TokenValues(*floats, flags[0], floats[0], floats[1], flags[1])
        return values, TokenGradients(torch.empty_like(z), [floats[0]], floats[1])

    def dense_divergence_(
        self, tile: torch.Tensor, student: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.counter.count([tile, student, tile, student, tile])
        return torch.empty(len(tile)), torch.empty(len(tile), dtype=torch.bool)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = torch.empty(len(a), b.shape[1])
        self.counter.count([result])
        return result

    def add_product_(self, total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        self.counter.count([a.t()])


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    stand_ins = StandIns(counter)
    monkeypatch.setattr(_kernels, "kernels", stand_ins.kernels)
    monkeypatch.setattr(_matmul, "product", stand_ins.product)
    monkeypatch.setattr(_fused_head, "add_product_", stand_ins.add_product_)
    return counter


def of_a_chunk(counter: Counter, **arguments: Any) -> tuple[int, float]:
    """What a further chunk costs: launches, and tiles of 16-bit logits that are moved beside those of the matmuls."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, WIDTH, generator=generator).bfloat16().requires_grad_() for rows in (TOKENS, VOCAB)
    )
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    found = []
    for chunks in (2, 3):
        rows = CHUNK * chunks
        counter.launches = counter.tile_bytes = 0
        with counter:
            fused_linear_distillation_loss(
                hidden[:rows],
                weight,
                labels[:rows],
                chunk_size=CHUNK,
                **{name: f(rows) for name, f in arguments.items()},
            ).loss.backward()
        found.append((counter.launches, counter.tile_bytes))
    tile = CHUNK * VOCAB * 2
    return found[1][0] - found[0][0], (found[1][1] - found[0][1]) / tile


def stored(rows: int) -> TopKTargets:
    log_probs, ids = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1)).log_softmax(-1).topk(K)
    return TopKTargets(ids[:rows], log_probs[:rows])


def model(kind: type, rows: int, **options: Any) -> Any:
    return kind(torch.ones(rows, WIDTH).bfloat16(), torch.ones(VOCAB, WIDTH).bfloat16(), **options)


CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "SFT": ({}, 20, 6),
    "SFT + KD": ({"teacher": stored, "kd_weight": lambda _: 0.3}, 20, 6),
    "SFT + KD, T = 2": ({"teacher": stored, "kd_weight": lambda _: 0.3, "temperature": lambda _: 2.0}, 20, 6),
    "live, whole vocabulary": ({"teacher": lambda rows: model(LinearTeacher, rows)}, 60, 31),
    "KL to a reference": ({"reference": lambda rows: model(LinearReference, rows)}, 60, 31),
}


@pytest.mark.parametrize("name", CASES)
def test_a_chunk_costs_no_more_than_this(counter: Counter, name: str) -> None:
    arguments, launches, tiles = CASES[name]
    found = of_a_chunk(counter, **arguments)
    assert found[0] <= launches
    assert found[1] <= tiles
