"""Models as what a loss needs of them: last hidden states and a head, whose logits are made a chunk of tokens at a time."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from trl_reasoning_distill.losses.divergence import accumulator

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Elements of the head's rows that are gathered at a time.
_CPU_GATHERED, _ACCELERATOR_GATHERED = 2**20, 2**25


class Head(NamedTuple):
    """A language-model head: `softcap(logit_scale * (hidden @ weight.T + bias))`."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    logit_scale: float
    logit_softcap: float | None

    def first(self, vocab: int, dtype: torch.dtype) -> Head:
        """The same for the first ids only, in the dtype of the matmul."""
        bias = None if self.bias is None else self.bias.detach()[:vocab].to(dtype)
        return self._replace(weight=self.weight.detach()[:vocab].to(dtype), bias=bias)

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """The logits, as the model's own forward pass rounds them."""
        weight, bias = self.weight, self.bias
        logits = torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())
        return self._capped_(logits)

    def named_logits(
        self,
        logits: Float[Tensor, "tokens vocab"],
        hidden: Float[Tensor, "tokens hidden"],
        ids: Int[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens k"]:
        """Some of the logits in float32: taken from the tile, or computed anew where it has rounded them to 16 bits.

        At |z| = 16 bfloat16 knows a logit to 0.06. The sum over a vocabulary forgives that, its few likely tokens do not.
        """
        dtype = accumulator(logits.dtype)
        if logits.dtype == dtype:
            return logits.gather(1, ids)
        named = torch.empty(ids.shape, dtype=dtype, device=ids.device)
        budget = _CPU_GATHERED if logits.device.type == "cpu" else _ACCELERATOR_GATHERED
        step = max(1, budget // (ids.shape[1] * hidden.shape[1]))
        for start in range(0, len(ids), step):
            rows = slice(start, start + step)
            torch.bmm(self.weight[ids[rows]].to(dtype), hidden[rows, :, None].to(dtype), out=named[rows, :, None])
        if self.bias is not None:
            named += self.bias[ids].to(dtype)
        return self._capped_(named)

    def _capped_(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.logit_softcap is not None:
            logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of these logits with respect to the projection: of `cap * tanh(x / cap)` it is `1 - (z / cap)²`."""
        if self.logit_softcap is None:
            return self.logit_scale
        return self.logit_scale * (1 - (logits / self.logit_softcap).square())


@dataclass(frozen=True)
class LinearModel:
    """A model's distribution as its last hidden states and its head; never differentiated.

    Attributes:
        hidden: `(tokens, hidden)`, one row per token of the student's, in the same order. The matmul runs in its dtype.
        weight: `(vocab, hidden)`, the model's head; whole, not sharded.
        bias: `(vocab,)`, if the head has one.
        logit_scale: factor on the logits.
        logit_softcap: soft-cap of the logits, after the factor.
    """

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.logit_scale, self.logit_softcap)


@dataclass(frozen=True)
class LinearReference(LinearModel):
    """A reference model, for the KL over the student's whole vocabulary.

    Rows of its head beyond the student's vocabulary (padding of the embedding) are not part of the distribution.
    """


@dataclass(frozen=True)
class LinearTeacher(LinearModel):
    """A live teacher, for the distillation loss.

    Student and teacher are compared on the ids that both know: each is the softmax over the first `vocab_size` ids.
    Rows of either head beyond them (padding of the embedding, as in 152,064 against 151,936) carry no mass there and get
    no gradient of the distillation loss.

    Attributes:
        vocab_size: how many ids the two share, from 0 on; by default as many as the smaller head has rows.
        top_k: compare on this many tokens and a bucket for all others, both exact; None for the whole vocabulary.
        on: whose most likely tokens those are: the `"teacher"`'s, or the `"student"`'s (for reverse KL, which weighs by
            the student's probabilities).
    """

    _: KW_ONLY
    vocab_size: int | None = None
    top_k: int | None = None
    on: Literal["teacher", "student"] = "teacher"

    def shared_ids(self, vocab: int) -> int:
        """How many ids the teacher shares with a student whose head has `vocab` rows."""
        return min(vocab, len(self.weight)) if self.vocab_size is None else self.vocab_size
