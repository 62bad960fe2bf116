"""What the loss does to whole rows of logits, in torch: the path for the CPU, and the reference for `_triton_rows`.

The functions walk over the tile in blocks of a few rows that stay in the cache, as a GPU kernel would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trl_reasoning_distill.losses.divergence import LOG_ZERO, accumulator

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Elements of a block of rows: 2 MiB of float32 for the cache of a core; on an accelerator the fewer launches the better.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**19, 2**26


class RowStatistics(NamedTuple):
    """A few numbers per row of logits, each `(tokens,)`; floats in float32 (float64 for float64 logits).

    Attributes:
        max: the largest logit; like the log-sum-exps no less than those of `LOG_ZERO`, also in a row of -inf.
        first_tie: the lowest id whose logit equals the `rival` that was given; the vocabulary's size if there is none or
            if some logit is larger.
        log_sum_exp: over the row.
        log_sum_exp_t: the same for logits divided by the temperature.
        mean: the expected logit under the softmax of the row.
    """

    max: Float[Tensor, " tokens"]
    first_tie: Int[Tensor, " tokens"]
    log_sum_exp: Float[Tensor, " tokens"]
    log_sum_exp_t: Float[Tensor, " tokens"]
    mean: Float[Tensor, " tokens"]

    def joined(self, other: RowStatistics, vocab: int) -> RowStatistics:
        """Statistics of the row that self, `vocab` ids wide, and `other` make up; what is at the temperature stays self's.

        Differentiable in both `log_sum_exp`.
        """
        log_sum_exp = torch.logaddexp(self.log_sum_exp, other.log_sum_exp)
        with torch.no_grad():
            mean = torch.lerp(other.mean, self.mean, torch.exp(self.log_sum_exp - log_sum_exp))
        is_first = (self.first_tie < vocab) & (self.max >= other.max)
        first_tie = torch.where(is_first, self.first_tie, vocab + other.first_tie)
        return RowStatistics(torch.maximum(self.max, other.max), first_tie, log_sum_exp, self.log_sum_exp_t, mean)


def row_statistics(
    logits: Float[Tensor, "tokens vocab"], temperature: float, rival: Float[Tensor, " tokens"]
) -> RowStatistics:
    """Reduce each row of logits; `rival` is a logit to look for, see `RowStatistics.first_tie`."""
    tokens, vocab = logits.shape
    dtype = accumulator(logits.dtype)
    maximum, log_sum_exp, log_sum_exp_t, mean = logits.new_empty(4, tokens, dtype=dtype)
    for rows, x, e in blocks(logits, dtype):
        top = torch.amax(x, dim=-1, out=maximum[rows]).clamp_min_(LOG_ZERO)[:, None]
        if temperature == 1.0:
            torch.sub(x, top, out=e).exp_()
        else:
            torch.add(-top / temperature, x, alpha=1 / temperature, out=e).exp_()
            log_sum_exp_t[rows] = e.sum(-1).log_() + top[:, 0] / temperature
            if temperature == 2.0:  # one exponential serves both: e^z = (e^(z/2))²
                e.mul_(e)
            else:
                torch.sub(x, top, out=e).exp_()
        total = e.sum(-1)
        log_sum_exp[rows] = total.log() + top[:, 0]
        mean[rows] = torch.linalg.vecdot(e, x) / total
    # A logit of -inf has no mass, but 0 * -inf is no number. It is rare: look at these rows again.
    undefined = mean.isnan().nonzero()[:, 0]
    if len(undefined):
        finite = logits[undefined].to(dtype).clamp_min_(LOG_ZERO)
        mean[undefined] = torch.linalg.vecdot(finite.softmax(-1), finite)
    log_sum_exp.clamp_min_(LOG_ZERO)  # a row of which nothing is left
    log_sum_exp_t.clamp_min_(LOG_ZERO / temperature)
    # A tie is rare, and finding the position of a maximum is slow on the CPU: look only where there is one.
    first_tie = torch.full((tokens,), vocab, device=logits.device)
    tied = (maximum == rival).nonzero()[:, 0]
    first_tie[tied] = logits[tied].argmax(-1)
    return RowStatistics(maximum, first_tie, log_sum_exp, log_sum_exp if temperature == 1.0 else log_sum_exp_t, mean)


def row_gradient_(
    logits: Float[Tensor, "tokens vocab"],
    statistics: RowStatistics,
    weight: Float[Tensor, " tokens"],
    weight_t: Float[Tensor, " tokens"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> None:
    """Overwrite each row with `weight * softmax(row) + weight_t * softmax(row / T)`, times d(logit)/d(projection).

    Args:
        logits: `(tokens, vocab)`, after scale and soft-cap.
        statistics: of these rows.
        weight: `(tokens,)`.
        weight_t: `(tokens,)`, or None for no second term; at temperature 1 there is none.
        temperature: T.
        logit_scale: the factor that was applied to the projection.
        logit_softcap: the soft-cap that was applied after it.
    """
    log_sum_exp, log_sum_exp_t = statistics.log_sum_exp[:, None], statistics.log_sum_exp_t[:, None]
    weight = weight[:, None] * logit_scale
    if weight_t is not None:
        weight_t = weight_t[:, None] * logit_scale
    for rows, x, e in blocks(logits, weight.dtype):
        slope = None
        if logit_softcap is not None:  # z = cap * tanh(y / cap), so dz/dy = 1 - (z / cap)²
            slope = 1 - (x / logit_softcap).square_()
        if weight_t is None:
            torch.sub(x, log_sum_exp[rows], out=e).exp_().mul_(weight[rows])
        elif temperature == 2.0:  # with r = e^((z - lse) / 2): weight * r² + weight_t * r * constant
            torch.add(-log_sum_exp[rows] / 2, x, alpha=0.5, out=e).exp_()
            constant = torch.exp(log_sum_exp[rows] / 2 - log_sum_exp_t[rows])
            e.mul_(torch.addcmul(constant * weight_t[rows], e, weight[rows], out=x))
        else:
            torch.sub(x, log_sum_exp[rows], out=e).exp_().mul_(weight[rows])
            e.addcmul_(x.div_(temperature).sub_(log_sum_exp_t[rows]).exp_(), weight_t[rows])
        logits[rows] = e if slope is None else e.mul_(slope)


def blocks(
    logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]]:
    """A few rows at a time: their slice, a copy of them, and a buffer of the same size; both are reused."""
    tokens, vocab = logits.shape
    threads = torch.get_num_threads()
    # Each operation on several threads ends with a wait for the last, on a busy machine for a time slice: have fewer.
    cpu_block = _CPU_BLOCK if threads == 1 else 2 * threads * _CPU_BLOCK
    size = max(1, (cpu_block if logits.device.type == "cpu" else _ACCELERATOR_BLOCK) // vocab)
    copy, buffer = logits.new_empty(2, min(size, tokens), vocab, dtype=dtype)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        length = rows.stop - start
        yield rows, copy[:length].copy_(logits[rows]), buffer[:length]
