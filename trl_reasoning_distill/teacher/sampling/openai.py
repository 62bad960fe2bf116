"""The `openai` engine: any server that speaks OpenAI's chat completions (vLLM, llama.cpp, `transformers serve`, hosted)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.schema import FinishReason
from trl_reasoning_distill.teacher.sampling.base import (
    THINK,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    restore_open_tag,
)
from trl_reasoning_distill.teacher.sampling.client import RefusedRequestError, ServerClient, ServerError

LEAVE_OUT = ("max_tokens", "temperature", "top_p", "seed")
"""What can be left out of a request, for a server that refuses it."""

_TRIES = 3  # of a prompt that a server refuses: content filters do not always decide alike
_FAILURES_IN_A_ROW = 16  # more than this, beside those in flight, and it is not the prompts
_ENDS = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")


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
        request_timeout: Seconds until a request must have been answered in full; then it is given up and retried.
        max_retries: Retries per request.
        chat_template_kwargs: Sent as `chat_template_kwargs`, which vLLM and llama.cpp hand to the chat template.
        leave_out: What of `LEAVE_OUT` is not sent; the server's own value then holds.

    Raises:
        ValueError: If no server is named, or an option is out of range.
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
        leave_out: Sequence[str] = (),
    ) -> None:
        if unknown := sorted(set(leave_out) - set(LEAVE_OUT)):
            raise ValueError(f"leave_out={unknown}: only {', '.join(LEAVE_OUT)} can be left out of a request.")
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
        self.leave_out = frozenset(leave_out)
        self._length_option = "max_tokens"

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield answers as they come; at most `concurrency` requests are under way.

        A request that the server refuses is asked again when the others have been answered. One that fails in the end is yielded with its
        `error`.

        Raises:
            ValueError: If the server cannot be reached, refuses the key, or fails many times in a row (answers that are under way are
                yielded first); or, after the failures, if it answered nothing.
        """
        answered = False
        remaining: Sequence[GenerationRequest] = requests
        failed: dict[str, tuple[GenerationRequest, GenerationOutput]] = {}
        for _ in range(_TRIES):
            refused = []
            for request, answer in self._ask(remaining, sampling):
                if isinstance(answer, GenerationOutput):
                    answered = True
                    failed.pop(request.key, None)
                    yield request, answer
                    continue
                failed[request.key] = request, GenerationOutput("", "error", 0, 0, 0.0, error=_explain(answer))
                if isinstance(answer, RefusedRequestError):
                    refused.append(request)
            remaining = refused
            if not refused or not answered:
                break
        yield from failed.values()
        if failed and not answered:
            raise ValueError(next(output.error for _, output in failed.values()))

    def _ask(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput | ServerError]]:
        """Each request with its answer, or its failure; when the server itself has failed, what is under way is still yielded."""
        fatal: ServerError | None = None
        in_a_row = 0

        def unless_failed() -> Iterator[GenerationRequest]:
            for request in requests:
                if fatal is not None:
                    return
                yield request

        def complete(client: Any, request: GenerationRequest) -> GenerationOutput:
            return self._complete(client, request, sampling)

        for request, answer in self._client.outcomes(complete, unless_failed()):
            in_a_row = in_a_row + 1 if isinstance(answer, ServerError) else 0
            if isinstance(answer, ServerError) and (
                answer.concerns_all or in_a_row > _FAILURES_IN_A_ROW + self._client.concurrency
            ):
                fatal = fatal or answer
                continue
            yield request, answer
        if fatal is not None:
            raise ValueError(_explain(fatal)) from fatal

    def _complete(self, client: Any, request: GenerationRequest, sampling: SamplingConfig) -> GenerationOutput:
        started = time.perf_counter()
        option = self._length_option
        try:
            body = self._call(client, request, sampling, option)
        except Exception as error:
            # OpenAI's own reasoning models take the limit by this name only
            if option != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self._length_option = "max_completion_tokens"
            body = self._call(client, request, sampling, self._length_option)
        choice, usage = body["choices"][0], body.get("usage") or {}
        num_tokens = int(usage.get("completion_tokens") or 0)
        reason = _finish_reason(choice.get("finish_reason"), num_tokens, sampling.max_new_tokens)
        return GenerationOutput(
            text=_text_of(choice.get("message") or {}, is_cut=reason == "length"),
            finish_reason=reason,
            num_tokens=num_tokens,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            seconds=time.perf_counter() - started,
        )

    def _call(
        self, client: Any, request: GenerationRequest, sampling: SamplingConfig, length_option: str
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
        }
        settings = {name: value for name, value in settings.items() if name not in self.leave_out}
        if "max_tokens" in settings:
            settings[length_option] = settings.pop("max_tokens")
        if sampling.stop:
            settings["stop"] = list(sampling.stop)
        extra: dict[str, Any] = {}
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        if self.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat_template_kwargs
        return self._client.ask(
            client.chat.completions.with_streaming_response.create,
            model=self.name,
            messages=request.messages,
            extra_body=extra or None,
            **settings,
        )


def _explain(error: ServerError) -> str:
    said = error.said if isinstance(error, RefusedRequestError) and error.status == 400 else ""
    refused = next((name for name in LEAVE_OUT if name in said), None)
    return f"{error} If it does not take {refused}: leave_out: [{refused}]." if refused else str(error)


def _finish_reason(said: Any, num_tokens: int, limit: int) -> FinishReason:
    """Anything but a natural end (a content filter, say) left the text incomplete; where a server names no reason, the limit decides."""
    if said is None:
        return "length" if num_tokens >= limit else "stop"
    return "stop" if said in _ENDS else "length"


def _text_of(message: Mapping[str, Any], *, is_cut: bool = False) -> str:
    """The whole text: servers with a reasoning parser (vLLM, DeepSeek, Mistral) hand the chain of thought over by itself."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    thoughts = [part for part in parts if isinstance(part, dict) and _is_thought(part)]
    text = "".join(_plain(part) for part in parts if part not in thoughts) or _plain(message.get("refusal"))
    own_fields = ("reasoning_content", "reasoning", "reasoning_details")
    reasoning = _plain(thoughts) or next((found for name in own_fields if (found := _plain(message.get(name)))), "")
    reasoning = reasoning.strip().removeprefix(THINK.open_tag).removesuffix(THINK.close_tag).strip()
    if not reasoning or THINK.close_tag in text:
        return restore_open_tag(text)
    if is_cut and not text.strip():
        return f"{THINK.open_tag}\n{reasoning}"
    return f"{THINK.open_tag}\n{reasoning}\n{THINK.close_tag}{THINK.gap}{text.lstrip()}"


def _is_thought(part: Mapping[str, Any]) -> bool:
    return str(part.get("type", "")).partition(".")[0] in ("thinking", "reasoning")


def _plain(value: Any) -> str:
    """The text in a field that holds a text, an object around one, or a list of such."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_plain, value))
    if isinstance(value, dict):
        return next((_plain(value[name]) for name in ("text", "thinking", "content", "summary") if value.get(name)), "")
    return ""
