"""Applications on real sockets: only there can a client hang up, and a stream stream."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Self

import uvicorn
from fastapi import FastAPI

from bridge_http.heads import HTTP
from tests.support.waiting import until

KEEPING: dict[str, Any] = {"timeout_keep_alive": 3600}
"""Closed after a pause of 5 s, as it is by default, a connection may go just when it is used again;
and who is asked whether connections are shared must not be asked how fast the machine is."""


class Served:
    """An application on a real socket, its lifespan included."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        # Of TCP by name, or its answers would wait for acknowledgements (Nagle) for 40 ms.
        self._listener = socket.socket(proto=socket.IPPROTO_TCP)
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, http=HTTP, log_level="warning", **KEEPING)
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}
        )

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def computed(self) -> float:
        """Seconds that its thread has computed: what it did, however slow the machine is."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def __exit__(self, *_: Any) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        self._listener.close()
