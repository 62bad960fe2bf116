"""Models as what a loss needs of them: last hidden states and a head."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from trl_reasoning_distill.losses.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float


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
