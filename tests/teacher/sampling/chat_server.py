"""A real HTTP server on loopback that answers chat completions as a test has it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any

Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""From a request's body, and how often its question was asked, to a status and an object, a text, or bytes that come one by one."""


def completion(text: str, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


class LoopbackServer(http.server.ThreadingHTTPServer):
    """Answers chat completions with `reply(body, times_this_question_was_asked)`, and remembers what it saw."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.seen: list[tuple[Message, dict[str, Any]]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests are about."""


def _encode(payload: Any) -> bytes:
    return (payload if isinstance(payload, str) else json.dumps(payload)).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.headers, body))
            times = sum(earlier["messages"] == body["messages"] for _, earlier in self.server.seen)
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        status, payload = self.server.reply(body, times)
        with self.server.lock:
            self.server.busy -= 1
        pieces = payload if isinstance(payload, Iterator) else iter([_encode(payload)])
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(payload, str) else "application/json")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output quiet."""
