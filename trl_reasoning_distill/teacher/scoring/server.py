"""A server reads: its log-probabilities of the tokens of a prompt, through OpenAI's completions.

There is no standard for this. vLLM has `prompt_logprobs`; others return the prompt with `echo` and its `logprobs`. Some take either
and ignore it, some are off by one position, some name tokens by texts that several tokens share. So nothing is believed: before the
first row the server is examined, and it is refused if it cannot give what was asked for.

A server tells log-probabilities at T = 1 and no log-sum-exp. At T = 1 that is all there is to know, and the tail is exact. At another
temperature the mass outside the Top-K depends on logits that were not told, so such a store holds T = 1 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs
from trl_reasoning_distill.teacher.sampling.client import RefusedRequestError, ServerClient
from trl_reasoning_distill.teacher.scoring.probe import examine
from trl_reasoning_distill.teacher.scoring.protocols import Protocol, UnusableAnswerError

_MASS_TOLERANCE = 0.01  # 16-bit log-probabilities add up to 1 no better than this


class ServerReader:
    """A teacher behind an OpenAI-compatible server that gives log-probabilities of its prompts, such as vLLM.

    Args:
        base_url: The server, such as `http://localhost:8000/v1`; `None`: `OPENAI_BASE_URL` from the environment.
        model: The name the server knows the model by.
        tokenizer: The model's tokenizer. The server is asked whether it has the same.
        top_k: M. vLLM gives at most 20 unless it was started with `--max-logprobs`.
        temperatures: Only 1: a server does not tell the tail at others.
        api_key_env: The environment variable that holds the key.
        concurrency: Requests in flight at once.
        batch_tokens: Tokens per request: short rows travel together.
        request_timeout: Seconds before a request is given up and retried.
        max_retries: Retries per request, with back-off, after 429, 5xx, a time-out or a lost connection.

    Raises:
        ValueError: If the server cannot be reached or cannot give what is asked for; the message names its address.
        MissingExtraError: If the `openai` client is not installed.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        tokenizer: Any,
        top_k: int,
        temperatures: Sequence[float] = (1.0,),
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        batch_tokens: int = 8192,
        request_timeout: float = 600.0,
        max_retries: int = 6,
    ) -> None:
        if tuple(temperatures) != (1.0,):
            raise ValueError(
                f"temperatures = {', '.join(f'{t:g}' for t in temperatures)}: a server tells log-probabilities at T = 1 only, and what it "
                "does not tell decides the tail at others. Ask for 1 alone, or let the teacher read in this process (engine: transformers)."
            )
        self._known = frozenset(tokenizer.get_vocab().values())  # not the rows that pad the embedding
        if not 1 <= top_k <= len(self._known):
            raise ValueError(f"top_k = {top_k}: give at least 1 and at most the teacher's {len(self._known)} tokens.")
        self.model, self.top_k, self.batch_tokens = model, top_k, batch_tokens
        self._client = ServerClient(
            base_url,
            model,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
        )
        self.base_url = self._client.base_url
        found = examine(self._ask, tokenizer, top_k, f"The server at {self.base_url}")
        self._protocol = found.protocol
        self.provenance: Mapping[str, Any] = {"protocol": found.protocol.name, "precision": found.precision}
        self.context_length = self._context_length()

    def read(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[TopKLogProbs]:
        """See `Reader`; blocks until the server has read all rows.

        Raises:
            ValueError: If the server fails for good, or an answer does not fit what was asked.
        """
        records = {number: TopKLogProbs.empty(self.top_k) for number in range(len(rows))}
        asked = [number for number in records if positions[number]]

        def read(client: Any, batch: list[int]) -> list[tuple[int, TopKLogProbs]]:
            choices = self._complete(client, self._protocol, [rows[number] for number in batch], self.top_k)
            return [
                (number, self._records(choice, rows[number], positions[number]))
                for number, choice in zip(batch, choices, strict=True)
            ]

        try:
            for answers in self._client.map(read, self._batches(asked, rows)):
                records.update(answers)
        except UnusableAnswerError as error:
            raise ValueError(f"The server at {self.base_url} {error}") from None
        return list(records.values())

    def _batches(self, numbers: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Row numbers in order, as many at a time as fit in a request."""
        batch: list[int] = []
        tokens = 0
        for number in numbers:
            if batch and tokens + len(rows[number]) > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(number)
            tokens += len(rows[number])
        if batch:
            yield batch

    def _records(self, choice: dict[str, Any], row: Sequence[int], positions: Sequence[int]) -> TopKLogProbs:
        """What a server said about a row, as records; ids that only pad the embedding are left to the tail."""
        shape = (len(positions), self.top_k)
        ids, log_probs = np.full(shape, MISSING_ID, np.int32), np.full(shape, -np.inf, np.float32)
        for place, candidates in enumerate(self._protocol.candidates(choice, row, positions)):
            if len(candidates) < self.top_k:
                raise UnusableAnswerError(
                    f"gave {len(candidates)} log-probabilities at a token, asked for {self.top_k}."
                )
            kept = [pair for pair in candidates[: self.top_k] if pair[0] in self._known]
            ids[place, : len(kept)] = [token for token, _ in kept]
            log_probs[place, : len(kept)] = [log_prob for _, log_prob in kept]
        mass = np.exp(log_probs.astype(np.float64)).sum(axis=1, keepdims=True)
        if not (mass <= 1 + _MASS_TOLERANCE).all():
            raise UnusableAnswerError(
                f"gave values that are no log-probabilities: {self.top_k} tokens have a mass of {mass.max():.3g}. Start vLLM with "
                "--logprobs-mode raw_logprobs."
            )
        log_probs -= np.log(np.maximum(mass, 1.0)).astype(np.float32)
        return TopKLogProbs(ids, log_probs, np.zeros((len(positions), 1), np.float32), (1.0,))

    def _ask(self, protocol: Protocol, prompts: Sequence[Any], top_k: int) -> list[dict[str, Any]]:
        """One request, waited for."""

        def ask(client: Any, batch: Sequence[Any]) -> list[dict[str, Any]]:
            return self._complete(client, protocol, batch, top_k)

        (choices,) = self._client.map(ask, [prompts])
        return choices

    def _complete(self, client: Any, protocol: Protocol, prompts: Sequence[Any], top_k: int) -> list[dict[str, Any]]:
        """The choices of a request, in the order of its prompts."""
        body = self._client.ask(
            client.completions.with_streaming_response.create,
            model=self.model,
            prompt=[prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts],
            max_tokens=1,  # not every server allows 0
            temperature=1.0,  # some divide the log-probabilities they tell by it
            extra_body=protocol.body(top_k),
        )
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts):
            raise UnusableAnswerError(f"gave {len(choices)} answers to {len(prompts)} prompts.")
        return choices

    def _context_length(self) -> int | None:
        """Tokens that a row may have beside the one that the server generates, if the server says so (vLLM does)."""

        def cards(client: Any, _: None) -> list[dict[str, Any]]:
            listed: list[dict[str, Any]] = self._client.ask(client.models.with_streaming_response.list)["data"]
            return listed

        try:
            (listed,) = self._client.map(cards, [None])
        except RefusedRequestError:
            return None
        longest = next((card.get("max_model_len") for card in listed if card.get("id") == self.model), None)
        return longest and int(longest) - 1
