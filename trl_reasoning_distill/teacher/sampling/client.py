"""A client of OpenAI-compatible servers: a bounded number of calls under way, retries, time-outs, and errors of one line."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trl_reasoning_distill.extras import require_extra

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# A local server asks for no key, but the client insists on one.
_NO_KEY = "none"


class RefusedRequestError(ValueError):
    """A server that was reached and said no (HTTP 4xx): what was asked is wrong for it, and asking again would not help.

    Attributes:
        status: The HTTP status.
        said: The server's own words.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class ServerClient:
    """Asks a server many things at once.

    After 429, 5xx, a time-out or a lost connection the client waits (exponential back-off with jitter, or what the server's
    `Retry-After` says) and tries again. The key is read from the environment, and never stored or shown.

    Args:
        base_url: The server, such as `http://localhost:8000/v1`; default: `OPENAI_BASE_URL` from the environment.
        model: The name the server knows the model by; for messages.
        api_key_env: The environment variable that holds the key.
        concurrency: Calls under way at once.
        request_timeout: Seconds before a call is given up and retried.
        max_retries: Retries per call.

    Raises:
        ValueError: If no server is named, or a number is out of range.
        MissingExtraError: If the `openai` client is not installed.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        api_key_env: str,
        concurrency: int,
        request_timeout: float,
        max_retries: int,
    ) -> None:
        self._openai = require_extra("server", "openai")
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not self.base_url:
            raise ValueError(
                "A server is needed: set base_url, such as http://localhost:8000/v1, or the environment variable OPENAI_BASE_URL."
            )
        if urlsplit(self.base_url).password is not None:
            raise ValueError(
                f"base_url holds a password, and addresses are logged: put the key into the environment variable {api_key_env}."
            )
        if concurrency < 1 or request_timeout <= 0 or max_retries < 0:
            raise ValueError(
                f"concurrency={concurrency}, request_timeout={request_timeout} and max_retries={max_retries}: "
                "give at least 1, more than 0 seconds, and at least 0."
            )
        self.model, self.api_key_env = model, api_key_env
        self.concurrency, self.request_timeout, self.max_retries = concurrency, request_timeout, max_retries

    def map(self, call: Callable[[Any, Item], Awaitable[Answer]], items: Iterable[Item]) -> Iterator[Answer]:
        """Yield the answers as they come, in any order; at most `concurrency` calls are under way.

        Args:
            call: Makes one call with an `openai.AsyncOpenAI` and an item.
            items: What to ask; taken as they can be asked.

        Raises:
            ValueError: If the server cannot be reached, refuses a call (`RefusedRequestError`), or keeps failing after all retries.
        """
        with _event_loop() as loop:
            client = self._openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=os.environ.get(self.api_key_env) or _NO_KEY,
                timeout=self.request_timeout,
                max_retries=self.max_retries,
            )
            in_flight: set[concurrent.futures.Future[Answer]] = set()
            try:
                for item in items:
                    in_flight.add(asyncio.run_coroutine_threadsafe(self._explained(call, client, item), loop))
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

    async def _explained(self, call: Callable[[Any, Item], Awaitable[Answer]], client: Any, item: Item) -> Answer:
        try:
            return await call(client, item)
        except self._openai.OpenAIError as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> ValueError:
        """One line: what went wrong, at which server, and what to do."""
        openai, where = self._openai, f"The server at {self.base_url}"
        tries = f"after {self.max_retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return ValueError(
                f"{where} did not answer within {self.request_timeout:g} s {tries}: raise request_timeout or lower concurrency."
            )
        if isinstance(error, openai.APIConnectionError):
            reason = error.__cause__ or error
            return ValueError(f"{where} cannot be reached ({reason}) {tries}: is it running, and is base_url right?")
        if not isinstance(error, openai.APIStatusError):
            return ValueError(f"{where}: {error}")
        status, said = error.status_code, f"{' '.join(str(error.message).split()):.500}"
        if status == 429 or status >= 500:
            return ValueError(f"{where} answered with HTTP {status} {tries}: {said}")
        if status == 401:
            message = (
                f"{where} refused the key (401): put a valid one into the environment variable {self.api_key_env}."
            )
        elif status == 404:
            message = f"{where} knows no model {self.model!r}, or does not serve what was asked (404): ask it for its /models."
        else:
            message = f"{where} answered with HTTP {status}: {said}"
        return RefusedRequestError(message, status, said)


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, so that a call also works where one already runs, as in Jupyter."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server-client", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
