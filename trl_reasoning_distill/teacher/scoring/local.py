"""A `transformers` model reads, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trl_reasoning_distill.hub import context_length
from trl_reasoning_distill.losses.head import body_of, input_device, prove_head
from trl_reasoning_distill.teacher.head import LanguageModelHead
from trl_reasoning_distill.teacher.records import TopKLogProbs

# A batch ends where rows become much shorter than its first, once it is large enough to keep a device busy: GSM8K's rows in units of 512
# then hold 4 % padding instead of 19 %.
_LIKE, _ENOUGH_TOKENS = 0.94, 2048


class TransformersReader:
    """A `transformers` model as teacher: hidden states from its body, the head only at the positions asked for.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        top_k: M.
        temperatures: Temperatures for the log-sum-exp, 1.0 among them.
        max_batch_tokens: Tokens per batch, padding included.

    Raises:
        ValueError: If M is larger than the vocabulary, or the model does something to its logits that is not known here.
    """

    provenance: Mapping[str, Any] = {}  # whoever loads the model knows all of it

    def __init__(
        self, model: Any, tokenizer: Any, top_k: int, temperatures: Sequence[float], *, max_batch_tokens: int = 16384
    ) -> None:
        self.model, self.max_batch_tokens = model.eval(), max_batch_tokens
        self.top_k, self.temperatures = top_k, tuple(temperatures)
        self.body, self.device = body_of(model), input_device(model)
        self.head = LanguageModelHead(model, list(tokenizer.get_vocab().values()))
        self.pad_id = tokenizer.pad_token_id or 0
        self.context_length = context_length(model.config)
        if top_k > self.head.num_tokens:
            raise ValueError(f"top_k = {top_k}, but the teacher has only {self.head.num_tokens} tokens.")
        prove_head(model, self.body, self.head.logits)

    def read(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[TopKLogProbs]:
        """See `Reader`; rows are put in batches of like length."""
        results: dict[int, TopKLogProbs] = {}
        for batch in self._batches([len(row) for row in rows]):
            hidden = self._hidden([rows[i] for i in batch], [positions[i] for i in batch])
            records = self.head.records(hidden, self.top_k, self.temperatures)
            start = 0
            for i in batch:
                results[i] = records.take(slice(start, start := start + len(positions[i])))
        return [results[i] for i in range(len(rows))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row numbers by falling length, as many at a time as the budget allows and are about as long; the largest batch comes first."""
        batch: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if batch:
                width = lengths[batch[0]]
                is_full = (len(batch) + 1) * width > self.max_batch_tokens
                if is_full or (lengths[number] < _LIKE * width and len(batch) * width >= _ENOUGH_TOKENS):
                    yield batch
                    batch = []
            batch.append(number)
        if batch:
            yield batch

    @torch.inference_mode()
    def _hidden(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states `(n, H)` that predict the tokens at `positions`, row after row."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        flat = [i * width + t - 1 for i, ts in enumerate(positions) for t in ts]
        return states.flatten(0, 1)[torch.tensor(flat, dtype=torch.long, device=states.device)]
