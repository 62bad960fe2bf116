"""The `openai` engine: any server that speaks OpenAI's chat completions (vLLM, llama.cpp, `transformers serve`, hosted)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from trl_reasoning_distill.extras import require_extra
from trl_reasoning_distill.teacher.engines.base import (
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    restore_open_tag,
)

# A local server asks for no key, but the client insists on one.
_NO_KEY = "none"


class OpenAIEngine:
    """Sends requests to a server, a bounded number at a time, and yields answers in the order they come.

    After 429, 5xx, a time-out or a lost connection the client waits (exponential back-off with jitter, or what the server's
    `Retry-After` says) and tries again. The key is read from the environment, and never stored or shown.

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
        self._openai = require_extra("server", "openai")
        self.name = model
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not self.base_url:
            raise ValueError(
                "The openai engine needs a server: set base_url, such as http://localhost:8000/v1, or OPENAI_BASE_URL."
            )
        if concurrency < 1 or request_timeout <= 0 or max_retries < 0:
            raise ValueError(
                f"concurrency={concurrency}, request_timeout={request_timeout} and max_retries={max_retries}: "
                "give at least 1, more than 0 seconds, and at least 0."
            )
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.request_timeout = request_timeout
        self.max_retries = max_retries
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield answers as they come; at most `concurrency` requests are under way.

        Raises:
            ValueError: If the server cannot be reached, refuses a request, or keeps failing after all retries.
        """
        with _event_loop() as loop:
            client = self._openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=os.environ.get(self.api_key_env) or _NO_KEY,
                timeout=self.request_timeout,
                max_retries=self.max_retries,
            )
            in_flight: set[concurrent.futures.Future[tuple[GenerationRequest, GenerationOutput]]] = set()
            try:
                for request in requests:
                    in_flight.add(asyncio.run_coroutine_threadsafe(self._complete(client, request, sampling), loop))
                    if len(in_flight) >= self.concurrency:
                        done, in_flight = concurrent.futures.wait(
                            in_flight, return_when=concurrent.futures.FIRST_COMPLETED
                        )
                        yield from (future.result() for future in done)
                yield from (future.result() for future in concurrent.futures.as_completed(in_flight))
            finally:
                for future in in_flight:
                    future.cancel()
                asyncio.run_coroutine_threadsafe(client.close(), loop).result()

    async def _complete(
        self, client: Any, request: GenerationRequest, sampling: SamplingConfig
    ) -> tuple[GenerationRequest, GenerationOutput]:
        started = time.perf_counter()
        extra: dict[str, Any] = {}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        if self.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat_template_kwargs
        try:
            response = await client.chat.completions.create(
                model=self.name,
                messages=request.messages,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request.seed,
                extra_body=extra or None,
            )
        except self._openai.OpenAIError as error:
            raise ValueError(self._explain(error)) from error
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

    def _explain(self, error: Exception) -> str:
        """One line: what went wrong, at which server, and what to do."""
        openai, where = self._openai, f"The server at {self.base_url}"
        tries = f"after {self.max_retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return f"{where} did not answer within {self.request_timeout:g} s {tries}: raise request_timeout or lower concurrency."
        if isinstance(error, openai.APIConnectionError):
            return (
                f"{where} cannot be reached ({error.__cause__ or error}) {tries}: is it running, and is base_url right?"
            )
        if isinstance(error, openai.AuthenticationError):
            return f"{where} refused the key (401): put a valid one into the environment variable {self.api_key_env}."
        if isinstance(error, openai.NotFoundError):
            return f"{where} knows no model {self.name!r}, or no chat completions under this address (404): ask it for its /models."
        if isinstance(error, openai.APIStatusError):
            said = " ".join(str(error.message).split())
            again = f" {tries}" if error.status_code == 429 or error.status_code >= 500 else ""
            return f"{where} answered with HTTP {error.status_code}{again}: {said:.500}"
        return f"{where}: {error}"


def _text_of(message: Any) -> str:
    """The whole text: servers with a reasoning parser (vLLM, DeepSeek) hand the chain of thought over in a field of its own."""
    content = message.content or ""
    fields = message.model_extra or {}
    reasoning = fields.get("reasoning_content") or fields.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip():
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
    return restore_open_tag(content)


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, so that `generate` also works where one already runs, as in Jupyter."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="openai-engine", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
