"""Servers for the tests of the `openai` engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.teacher.sampling.chat_server import LoopbackServer, Reply


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], LoopbackServer]]:
    servers: list[LoopbackServer] = []

    def start(reply: Reply) -> LoopbackServer:
        server = LoopbackServer(reply)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
