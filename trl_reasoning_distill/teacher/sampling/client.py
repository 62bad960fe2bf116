"""A client of OpenAI-compatible servers: a bounded number of calls at once, retries, deadlines, and errors of one line."""

from __future__ import annotations

import itertools
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trl_reasoning_distill.extras import require_extra

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_NO_KEY = "none"  # a local server asks for no key, but the client insists on one
_LONGEST_PAUSE, _LONGEST_WAIT = 8.0, 60.0  # seconds between two tries, of our own and as a server asks
_FOR_ALL = (401, 403, 404, 429)  # statuses that have nothing to do with the one request that met them


class ServerError(ValueError):
    """A call that a server did not answer, whatever was tried.

    Attributes:
        concerns_all: Whether any other call would fail as well: no connection, a wrong key, an unknown model, too many calls.
    """

    def __init__(self, message: str, concerns_all: bool = False) -> None:
        super().__init__(message)
        self.concerns_all = concerns_all


class RefusedRequestError(ServerError):
    """A server that was reached and refused (HTTP 4xx): what was asked is wrong for it.

    Attributes:
        status: The HTTP status.
        said: The server's own words.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message, status in _FOR_ALL)
        self.status, self.said = status, said


class UnusableBodyError(Exception):
    """HTTP 200 with something else than an answer in it."""


class ServerClient:
    """Asks a server many things at once, through the `openai` package.

    After 429, 5xx, a time-out, a lost connection, or a 200 that holds no answer (an error object, HTML, no choices) a call waits
    (exponential back-off with jitter, or as long as the server's `Retry-After` asks for) and is made again. The key is read from the environment, and
    never stored or shown.

    Args:
        base_url: The server, such as `http://localhost:8000/v1`; default: `OPENAI_BASE_URL` from the environment.
        model: The name the server knows the model by; for messages.
        api_key_env: The environment variable that holds the key.
        concurrency: Calls at once.
        request_timeout: Seconds until a call must have been answered in full; then it is given up and made again.
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

    def map(self, call: Callable[[Any, Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """Yield the answers as they come, in any order.

        Args:
            call: Makes one call with an `openai.OpenAI` and an item; in a thread of its own.
            items: What to ask; taken as they can be asked.

        Raises:
            ServerError: If a call fails.
        """
        for _, answer in self.outcomes(call, items):
            if isinstance(answer, ServerError):
                raise answer
            yield answer

    def outcomes(
        self, call: Callable[[Any, Item], Answer], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Answer | ServerError]]:
        """`map`, but each item with its answer or with the reason why there is none, so that one failure loses no other answer."""
        ended: queue.SimpleQueue[tuple[Item, Answer | BaseException]] = queue.SimpleQueue()
        waiting, in_flight = iter(items), 0
        with self._connect() as client:

            def work(item: Item) -> None:
                ended.put((item, self._outcome(call, client, item)))

            while True:
                for item in itertools.islice(waiting, self.concurrency - in_flight):
                    # A daemon: an interrupted program does not wait for a server
                    threading.Thread(target=work, args=(item,), name="server-call", daemon=True).start()
                    in_flight += 1
                if not in_flight:
                    return
                item, answer = ended.get()
                in_flight -= 1
                if isinstance(answer, BaseException) and not isinstance(answer, ServerError):
                    raise answer
                yield item, answer

    def ask(self, create: Callable[..., Any], **parameters: Any) -> dict[str, Any]:
        """Make one call until it is answered, and at most `max_retries` times again.

        Args:
            create: A method of the client under `with_streaming_response`, such as
                `client.chat.completions.with_streaming_response.create`: the answer is read bit by bit, with an eye on the clock.
            parameters: For it.

        Returns:
            The answer, as the JSON object that it is.

        Raises:
            openai.OpenAIError: If the server refuses the call, or it fails in the end.
            UnusableBodyError: If it has no answer in it in the end.
        """
        for tried in itertools.count(1):
            try:
                return self._read(create, parameters)
            except (self._openai.OpenAIError, UnusableBodyError) as error:
                if tried > self.max_retries or not self._is_worth_another_try(error):
                    raise
                time.sleep(_pause(error, tried))
        raise AssertionError("unreachable")

    def _read(self, create: Callable[..., Any], parameters: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self.request_timeout
        content = bytearray()
        with create(**parameters) as response:
            request = response.http_request
            try:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        break
            except Exception as error:  # the HTTP library's own, which is another one in each version of `openai`
                late = time.monotonic() > deadline
                kind = self._openai.APITimeoutError if late else self._openai.APIConnectionError
                raise kind(request=request) from error
        if time.monotonic() > deadline:
            raise self._openai.APITimeoutError(request=request)
        return _parse(bytes(content), must_have_choices=request.url.path.endswith("/completions"))

    def _is_worth_another_try(self, error: Exception) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code in (408, 409, 429) or error.status_code >= 500
        return isinstance(error, (self._openai.APIConnectionError, UnusableBodyError))

    def _connect(self) -> Any:
        return self._openai.OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.api_key_env) or _NO_KEY,
            timeout=self.request_timeout,
            max_retries=0,  # `ask` makes calls again, and for more reasons
        )

    def _outcome(self, call: Callable[[Any, Item], Answer], client: Any, item: Item) -> Answer | BaseException:
        try:
            return call(client, item)
        except (self._openai.OpenAIError, UnusableBodyError) as error:
            return self._explain(error)
        except BaseException as error:
            return error

    def _explain(self, error: Exception) -> ServerError:
        """One line: what went wrong, at which server, and what to do."""
        openai, where = self._openai, f"The server at {self.base_url}"
        tries = f"after {self.max_retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return ServerError(
                f"{where} did not answer within {self.request_timeout:g} s {tries}: raise request_timeout or lower concurrency."
            )
        if isinstance(error, openai.APIConnectionError):
            reason = error.__cause__ or error
            return ServerError(
                f"{where} cannot be reached ({reason}) {tries}: is it running, and is base_url right?",
                concerns_all=True,
            )
        if isinstance(error, UnusableBodyError):
            return ServerError(f"{where} answered {tries} with HTTP 200 and {error}.")
        if not isinstance(error, openai.APIStatusError):
            return ServerError(f"{where}: {error}")
        status = error.status_code
        said = _one_line(error.message).removeprefix(f"Error code: {status} - ")
        if status == 429 or status >= 500:
            return ServerError(f"{where} answered with HTTP {status} {tries}: {said}", status in _FOR_ALL)
        if status == 401:
            message = (
                f"{where} refused the key (401): put a valid one into the environment variable {self.api_key_env}."
            )
        elif status == 404:
            message = f"{where} knows no model {self.model!r}, or does not serve what was asked (404): ask it for its /models."
        else:
            message = f"{where} answered with HTTP {status}: {said}"
        return RefusedRequestError(message, status, said)


def _parse(content: bytes, must_have_choices: bool) -> dict[str, Any]:
    """The body of a 200.

    Raises:
        UnusableBodyError: If it is no answer.
    """
    try:
        body = json.loads(content)
    except ValueError:
        raise UnusableBodyError(f"{_one_line(content.decode(errors='replace'))[:80]!r}, which is not JSON") from None
    if not isinstance(body, dict):
        raise UnusableBodyError(f"JSON that is no object ({type(body).__name__})")
    choices = body.get("choices")
    answers = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    if error := next((one["error"] for one in [body, *answers] if one.get("error")), None):
        raise UnusableBodyError(f"the error {_one_line(json.dumps(error, ensure_ascii=False))}")
    if must_have_choices and not answers:
        raise UnusableBodyError(f"choices = {_one_line(json.dumps(choices))[:80]}")
    return body


def _pause(error: Exception, tried: int) -> float:
    """Seconds until the next try: what the server asks for, else twice as long each time, with jitter."""
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, min(float(headers["retry-after"]), _LONGEST_WAIT))
    except (KeyError, ValueError):  # there is none, or it is a date
        return min(0.5 * 2 ** (tried - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.0)


def _one_line(text: Any) -> str:
    return f"{' '.join(str(text).split()):.500}"
