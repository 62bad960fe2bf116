"""A real HTTP server on loopback that tells a real model's log-probabilities of a prompt, as vLLM does; and its bad relatives."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from typing import Any

import torch

MODEL_NAME = "tiny-teacher"


class PromptServer(http.server.ThreadingHTTPServer):
    """Serves `/v1/completions` and `/v1/models`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        options: Overrides of `max_logprobs` (HTTP 400 beyond it) and `serves` (of `prompt_logprobs` and `echo`), and ways to go wrong:
            `shift` (positions off by so many), `names` (`"text"`: echo names tokens by text), `cap` (fewer log-probs without a word),
            `decimals` and `dtype` (of the logits), `scale` (of the values), `failures` (statuses of the next answers), `delay` in seconds.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer = model, tokenizer
        self.options: dict[str, Any] = {"max_logprobs": 20, "serves": ("prompt_logprobs", "echo")} | options
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen: list[tuple[Message, dict[str, Any]]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests are about."""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        options = self.options
        if options.get("failures"):
            return options["failures"].pop(0), {"error": {"message": "try again"}}
        time.sleep(options.get("delay", 0.0))
        if body["model"] != MODEL_NAME:
            return 404, {"error": {"message": "no such model"}}
        asked = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
        if asked > options["max_logprobs"]:
            said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {options['max_logprobs']}"
            return 400, {"error": {"message": said}}
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return 200, {"choices": [self._choice(index, prompt, body) for index, prompt in enumerate(prompts)][::-1]}

    def _choice(self, index: int, prompt: Any, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        choice: dict[str, Any] = {"index": index, "text": "!", "finish_reason": "length", "logprobs": None}
        serves = self.options["serves"]
        if "prompt_logprobs" in serves and body.get("prompt_logprobs"):
            told = self._told(ids, body["prompt_logprobs"])
            choice["prompt_logprobs"] = [
                one and {str(i): {"logprob": p, "rank": n + 1} for n, (i, p) in enumerate(one.items())} for one in told
            ]
        if "echo" in serves and body.get("echo"):
            by_text = self.options.get("names") == "text" or not body.get("return_tokens_as_token_ids")
            name = self.tokenizer.decode if by_text else "token_id:{}".format
            told = [*self._told(ids, body["logprobs"]), {0: -0.5}]
            choice["logprobs"] = {
                "tokens": [name(i) for i in [*ids, 0]],
                "token_logprobs": [one and one.get(i) for i, one in zip([*ids, 0], told, strict=True)],
                "top_logprobs": [one and {name(i): p for i, p in one.items()} for one in told],
            }
        return choice

    def _told(self, ids: list[int], top_k: int) -> list[dict[int, float] | None]:
        """Per position the K most likely tokens and the prompt's own; nothing for the first."""
        options = self.options
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        log_p = logits.to(options.get("dtype", torch.float32)).float().log_softmax(-1) * options.get("scale", 1.0)
        told: list[dict[int, float] | None] = [None]
        for t in range(1, len(ids)):
            here = log_p[min(max(t - 1 + options.get("shift", 0), 0), len(ids) - 1)]
            wanted = [*here.topk(min(top_k, options.get("cap", top_k))).indices.tolist(), ids[t]]
            told.append({i: round(float(here[i]), options.get("decimals", 12)) for i in wanted})
        return told


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PromptServer

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": MODEL_NAME, "object": "model", "max_model_len": 128}]})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.headers, body))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            answer = server.answer(body)
        finally:
            with server.lock:
                server.busy -= 1
        self._send(*answer)

    def _send(self, status: int, payload: dict[str, Any]) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output quiet."""


@contextmanager
def prompt_server(model: Any, tokenizer: Any, **options: Any) -> Iterator[PromptServer]:
    """A server for the time of a `with` block; its address is `.url`, the model's name there `MODEL_NAME`."""
    server = PromptServer(model, tokenizer, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
