"""The `openai` engine: any server that speaks OpenAI's chat completions (vLLM, llama.cpp, `transformers serve`, hosted)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.teacher.sampling.base import (
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    restore_open_tag,
)
from trl_reasoning_distill.teacher.sampling.client import ServerClient


class OpenAIEngine:
    """Sends requests to a server, a bounded number at a time, and yields answers in the order they come; see `ServerClient`.

    The seed travels with each request. Whether it fixes the text is up to the server: vLLM draws each request with its own
    seed; `transformers serve` sets a global one, which concurrent requests share, and samples only if the model's
    `generation_config.json` has `do_sample`.

    Args:
        model: The name the server knows the model by.
        base_url: The server, such as `http://localhost:8000/v1`; default: `OPENAI_BASE_URL` from the environment.
        api_key_env: The environment variable that holds the key.
        concurrency: Requests in flight at once.
        request_timeout: Seconds before a request is given up and retried.
        max_retries: Retries per request.
        chat_template_kwargs: Sent as `chat_template_kwargs`, which vLLM and llama.cpp hand to the chat template.

    Raises:
        ValueError: If no server is named, or a number is out of range.
        MissingExtraError: If the `openai` client is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        request_timeout: float = 600.0,
        max_retries: int = 6,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = model
        self._client = ServerClient(
            base_url,
            model,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout=request_timeout,
            max_retries=max_retries,
        )
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield answers as they come; at most `concurrency` requests are under way.

        Raises:
            ValueError: If the server cannot be reached, refuses a request, or keeps failing after all retries.
        """

        def complete(client: Any, request: GenerationRequest) -> Any:
            return self._complete(client, request, sampling)

        yield from self._client.map(complete, requests)

    async def _complete(
        self, client: Any, request: GenerationRequest, sampling: SamplingConfig
    ) -> tuple[GenerationRequest, GenerationOutput]:
        started = time.perf_counter()
        extra: dict[str, Any] = {}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        if self.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat_template_kwargs
        response = await client.chat.completions.create(
            model=self.name,
            messages=request.messages,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            extra_body=extra or None,
        )
        choice, usage = response.choices[0], response.usage
        output = GenerationOutput(
            text=_text_of(choice.message),
            # Anything but a natural end (a content filter, say) left the text incomplete.
            finish_reason="stop" if choice.finish_reason == "stop" else "length",
            num_tokens=usage.completion_tokens if usage else 0,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            seconds=time.perf_counter() - started,
        )
        return request, output


def _text_of(message: Any) -> str:
    """The whole text: servers with a reasoning parser (vLLM, DeepSeek) hand the chain of thought over in a field of its own."""
    content = message.content or ""
    fields = message.model_extra or {}
    reasoning = fields.get("reasoning_content") or fields.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip():
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
    return restore_open_tag(content)
