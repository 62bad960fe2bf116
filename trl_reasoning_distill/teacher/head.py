"""From hidden states to Top-M log-probabilities and log-sum-exp, tile by tile: tokens × vocabulary is never built.

Log-sum-exp and Top-M cost more than the matmul if done naively. Both read a tile of logits once or twice while it is warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_reasoning_distill.losses.head import Head
from trl_reasoning_distill.losses.topk import exact_top_k
from trl_reasoning_distill.teacher.records import TopKLogProbs

_TILE_BYTES_CPU, _TILE_BYTES_GPU = 1 << 25, 1 << 30


class LanguageModelHead:
    """A causal language model's output layer, with what its forward does to the logits afterwards.

    Where the weight is a plain 16-bit matrix, logits are accumulated and kept in float32: at |z| = 20 a bfloat16 logit is only
    known to 0.06, a thousand times the store's error.

    Args:
        model: A `transformers` causal language model.
        token_ids: The ids that the tokenizer knows. All others are rows that pad the embedding: they count in the log-sum-exp,
            since the model does give them mass, but never among the Top-M.
    """

    def __init__(self, model: Any, token_ids: Sequence[int]) -> None:
        self.layer: nn.Module = model.get_output_embeddings()
        self.head = Head.of(model, getattr(self.layer, "base_layer", self.layer))
        self.vocab_size: int = model.config.get_text_config().vocab_size
        is_padding = torch.ones(self.vocab_size, dtype=torch.bool)
        is_padding[[token for token in token_ids if token < self.vocab_size]] = False
        self._padding = is_padding.nonzero().squeeze(1)
        self.num_tokens = self.vocab_size - len(self._padding)
        self._float_weight: Tensor | None = None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """`(n, H)` to `(n, V)`, float32, as the model's own forward makes them."""
        return self.head.transform_(self._project(hidden)[:, : self.vocab_size])

    def _project(self, hidden: Tensor) -> Tensor:
        layer = self.layer
        if type(layer) is not nn.Linear or hasattr(
            layer, "_hf_hook"
        ):  # quantised, adapted, or moved in when it is called
            return layer(hidden).float()
        weight = layer.weight
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return layer(hidden.to(weight.dtype)).float()
        if weight.is_cuda:
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        else:
            if self._float_weight is None:
                self._float_weight = weight.float()
            logits = hidden.float() @ self._float_weight.t()
        return logits if layer.bias is None else logits + layer.bias.float()

    @torch.inference_mode()
    def records(self, hidden: Tensor, top_k: int, temperatures: Sequence[float]) -> TopKLogProbs:
        """What the model says after each hidden state.

        Args:
            hidden: `(n, H)`, the last hidden states.
            top_k: M.
            temperatures: Temperatures for the log-sum-exp, 1.0 among them.
        """
        budget = _TILE_BYTES_GPU if hidden.is_cuda else _TILE_BYTES_CPU
        rows = max(8, budget // (4 * self.vocab_size))
        tiles = [self._tile(tile, top_k, temperatures) for tile in hidden.split(rows) if len(tile)]
        return TopKLogProbs.concatenate([TopKLogProbs.empty(top_k, temperatures), *tiles])

    def _tile(self, hidden: Tensor, top_k: int, temperatures: Sequence[float]) -> TopKLogProbs:
        logits = self.logits(hidden)
        peak = logits.amax(dim=-1, keepdim=True)
        logits = logits - peak
        lse = torch.stack([(logits / t if t != 1.0 else logits).exp().sum(dim=-1).log() for t in temperatures], dim=1)
        one = lse[:, list(temperatures).index(1.0)]
        padding = self._padding.to(logits.device)
        padded = logits[:, padding]
        logits[:, padding] = -torch.inf
        values, ids = exact_top_k(logits, top_k)
        logits[:, padding] = padded
        log_tail = _log_sum_exp(logits.scatter_(1, ids, -torch.inf), temperatures) - lse
        lse = lse - one[:, None] / torch.tensor(temperatures, dtype=lse.dtype, device=lse.device)
        return TopKLogProbs(
            ids.to("cpu", torch.int32).numpy(),
            (values - one[:, None]).cpu().numpy(),
            lse.cpu().numpy(),
            tuple(temperatures),
            log_tail.cpu().numpy(),
        )


def _log_sum_exp(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """`(n, temperatures)`, relative to the largest of each row: beside a token that is all but certain, the rest underflows."""
    peak = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    logits = logits - peak
    sums = [(logits / t if t != 1.0 else logits).exp().sum(dim=-1).log() + peak[:, 0] / t for t in temperatures]
    return torch.stack(sums, dim=1)
