"""A real S3 server for tests, from PyPI (`moto`), as a process of its own; and a gate before it
that can be shut, as a network is cut."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ports import free_port
from tests.support.waiting import PATIENCE

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def running_s3() -> Iterator[str]:
    """Starts a server that keeps all in memory; its URL."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > until:
                    raise AssertionError("the S3 server did not start") from None
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


class Gate:
    """A TCP port that leads to another one, unless it is shut: then connections are refused, and
    those that are open break."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = free_port()
        self._listener = self._listen(self.port)
        self.passed = 0
        """Bytes that clients have sent through it."""
        self.shut_after: int | None = None
        """Shuts itself when so many bytes have passed."""
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._start(self._accept, self._listener)

    def shut(self) -> None:
        """Nobody comes through any more."""
        with self._lock:
            self._listener.close()
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._open.clear()

    def open(self) -> None:
        """Lets everybody through again."""
        self._listener = self._listen(self.port)
        self._start(self._accept, self._listener)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        listener.settimeout(0.05)
        return listener

    def _start(self, work: object, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(None)
            server = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                if listener.fileno() < 0:  # it was shut while this one was on its way
                    client.close()
                    server.close()
                    return
                self._open += [client, server]
            self._start(self._copy, client, server, True)
            self._start(self._copy, server, client, False)

    def _copy(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                self.passed += len(data) if counted else 0
                if self.shut_after is not None and self.passed > self.shut_after:
                    self.shut_after = None
                    self.shut()
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
