"""A request's head has a limit: one without an end is cut off, and nobody else waits for it."""

from __future__ import annotations

import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from bridge_http import heads
from bridge_http.heads import HTTP, MAX_BYTES
from service.__main__ import _serve, _Server
from service.app import create_app
from service.settings import Settings
from tests.api.house import Service

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
KEPT = MAX_BYTES + 2 * 256_000
"""What a head may come to, with the reads that are not counted."""
SENT = 20_000_000
BUFFERS = 8_000_000
"""More than both sides of a connection on loopback hold that nobody has read."""


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    with Service(settings) as service:
        yield service


def connect(url: str) -> socket.socket:
    return socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=120)


def send(connection: socket.socket, line: bytes, most: int = SENT) -> int:
    """Sends the same again and again until nobody takes it; how many bytes were taken."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(line)
            sent += len(line)
    except OSError:
        pass
    return sent


def answer(connection: socket.socket) -> bytes:
    """All that comes before the connection is closed."""
    received = b""
    try:
        while chunk := connection.recv(65_536):
            received += chunk
    except ConnectionError:
        pass
    return received


ENDLESS = {
    "lines": (HEAD, b"X: " + b"a" * 50_000 + b"\r\n"),
    "a line": (HEAD + b"X: ", b"a" * 50_000),
    "a name": (HEAD, b"a" * 50_000),
    "an address": (b"GET /", b"a" * 50_000),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: " + b"a" * 50_000 + b"\r\n"),
    "a chunk's extension": (CHUNKED + b"2;", b"a" * 50_000),
    "a second head": (HEAD + b"\r\n" + HEAD, b"X: " + b"a" * 50_000 + b"\r\n"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_head_without_an_end_is_cut_off_soon(service: Service, kind: str) -> None:
    begin, line = ENDLESS[kind]
    with connect(service.url) as connection:
        connection.sendall(begin)
        assert send(connection, line) < KEPT + BUFFERS < SENT
    assert httpx.get(f"{service.url}/healthz", timeout=120).status_code == 200


def test_head_that_is_too_long_is_told_so(service: Service) -> None:
    with connect(service.url) as connection:
        connection.sendall(HEAD + b"X: ")
        for _ in range(MAX_BYTES // 1000):
            connection.sendall(b"a" * 1000)
        connection.sendall(b"a" * (MAX_BYTES % 1000 - len(HEAD) - 3))
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):  # exactly the limit
            connection.recv(1)
        connection.settimeout(120)
        connection.sendall(b"a")
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 400 ")
    assert told.endswith(b"The request's head is longer than 65536 bytes.")


def test_nobody_waits_for_heads_without_an_end(service: Service) -> None:
    """Unfinished lines were appended to in quadratic time: seconds for one of 120 MB. Waited for is
    what the service computes meanwhile."""

    def shout() -> None:
        for _ in range(3):
            with connect(service.url) as connection:
                connection.sendall(HEAD + b"X: ")
                send(connection, b"a" * 100_000, 120_000_000)

    attack = threading.Thread(target=shout)
    attack.start()
    waits = []
    with httpx.Client(base_url=service.url, timeout=120) as client:
        while attack.is_alive() or not waits:
            begun = service.computed()
            assert client.get("/healthz").status_code == 200
            waits.append(service.computed() - begun)
    attack.join()
    assert max(waits) < 2


def test_long_heads_and_long_bodies_pass_on_one_connection(service: Service) -> None:
    """Bytes of a body are none of a head, and each request's head is counted by itself."""
    body = b'{"method": "' + b"a" * 900_000 + b'"}'
    long = {"X": "a" * 60_000, "Content-Type": "application/json"}
    with httpx.Client(base_url=service.url, timeout=120) as client:
        for _ in range(3):
            assert client.get("/healthz", headers=long).status_code == 200
            assert client.post("/jobs", content=body, headers=long).status_code == 422
            chunks = (body[at : at + 7_000] for at in range(0, len(body), 7_000))
            assert client.post("/jobs", content=chunks, headers=long).status_code == 422


def test_pipelined_requests_are_each_answered(service: Service) -> None:
    post = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    long = b"X: " + b"a" * 50_000 + b"\r\n"
    body = b"{" + b" " * 200_000 + b"}"
    with connect(service.url) as connection:
        for _ in range(3):
            connection.sendall(post + long + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.sendall(HEAD + long + b"Connection: close\r\n\r\n")
        answers = answer(connection)
    assert answers.count(b"HTTP/1.1 422 ") == 3
    assert answers.count(b"HTTP/1.1 200 ") == 1


def test_trailers_within_the_limit_pass(service: Service) -> None:
    trailers = b"X: " + b"a" * 50_000 + b"\r\nConnection: close\r\n\r\n"
    with connect(service.url) as connection:
        connection.sendall(CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        connection.sendall(b"2\r\n{}\r\n0\r\n" + trailers)
        assert answer(connection).startswith(b"HTTP/1.1 415 ")


def test_service_is_served_with_the_limit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[uvicorn.Config] = []
    monkeypatch.setattr(_Server, "run", lambda self: served.append(self.config))
    _serve(create_app(settings), settings)
    assert served[0].http is HTTP


@pytest.mark.timeout(900)  # it waits for inference to start
def test_inference_is_served_with_the_limit(inference: str) -> None:
    with connect(inference) as connection:
        connection.sendall(HEAD + b"X: ")
        assert send(connection, b"a" * 50_000) < KEPT + BUFFERS
    assert httpx.get(f"{inference}/health", timeout=120).status_code == 200


def test_without_httptools_uvicorns_own_parser_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "httptools", None)
    monkeypatch.delitem(sys.modules, "uvicorn.protocols.http.httptools_impl", raising=False)
    assert runpy.run_path(str(Path(heads.__file__)))["HTTP"] == "auto"
