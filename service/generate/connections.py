"""Connections to an inference server, kept open from one request to the next.

A server closes a connection that has been idle for long enough, and a request may be on its way
just then: it meets a closed door, and nothing is wrong. aiohttp sends a GET again and not a POST.
Here such a request is sent once more, over a connection of its own, where all says that this is
what happened: the connection had served before, it was closed as soon as the request was sent, and
not a byte of an answer came. A server that dies over a request is not asked the same again.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

CONNECT_SECONDS = 2.0
IDLE_SECONDS = 4.0
"""So long an idle connection is kept: a little less than uvicorn keeps one, which vLLM runs in."""
AT_ONCE_SECONDS = 1.0
"""The end of a connection that was closed before the request came is heard so soon after it."""


class Connections:
    """To one server, which gets these headers with every request."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = url, headers
        self._by_loop: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, aiohttp.ClientSession]
        ] = weakref.WeakKeyDictionary()

    async def ask(
        self, method: str, path: str, content: bytes | None, seconds: float
    ) -> aiohttp.ClientResponse:
        """The head of the answer, once it is there; no silence may be longer than `seconds`."""
        kept, fresh = self._clients()
        request: dict[str, Any] = {
            "data": content,
            "headers": {"Content-Type": "application/json"} if content else None,
            "allow_redirects": False,
            "timeout": aiohttp.ClientTimeout(None, connect=CONNECT_SECONDS, sock_read=seconds),
        }
        try:
            response = await kept.request(method, self._url + path, **request)
        except _WasClosed:
            response = await fresh.request(method, self._url + path, **request)
        _end_with_the_connection(response)
        return response

    async def close(self) -> None:
        """Closes those that the running event loop keeps open."""
        for client in self._clients():
            await client.close()

    def _clients(self) -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
        """The running event loop's own two, for connections cannot be shared between loops: one
        that keeps them, and one that opens a new one each time. They are aiohttp's, for httpx takes
        three times the CPU time, and more where there are many of them."""
        loop = asyncio.get_running_loop()
        if (clients := self._by_loop.get(loop)) is None:
            kept = self._client(keepalive_timeout=IDLE_SECONDS)
            clients = self._by_loop[loop] = kept, self._client(force_close=True)
        return clients

    def _client(self, **how: Any) -> aiohttp.ClientSession:
        # a server that starts anew may be at another address
        connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False, **how)
        factory = partial(_Protocol, loop=asyncio.get_running_loop())
        connector._factory = factory  # type: ignore[assignment]  # there is no other way in
        return aiohttp.ClientSession(
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=connector,
            response_class=_Response,
            # A loopback address must never be sent through a proxy of the environment.
            trust_env=False,
        )


class _WasClosed(aiohttp.ServerDisconnectedError):
    """The server had closed the connection before the request came."""


class _Protocol(ResponseHandler):
    """One that counts the bytes that ever came over its connection."""

    received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)


class _Response(aiohttp.ClientResponse):
    """One that tells what it was in vain for."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        assert isinstance(protocol, _Protocol)
        before, began = protocol.received, asyncio.get_running_loop().time()
        try:
            return await super().start(connection)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            late = asyncio.get_running_loop().time() - began > AT_ONCE_SECONDS
            if late or not before or protocol.received != before:
                raise
            raise _WasClosed from error


def _end_with_the_connection(response: aiohttp.ClientResponse) -> None:
    """Where the server's bytes stop being HTTP, aiohttp lets go of the connection, the clock of its
    silence with it, and tells nobody who reads: they would wait for ever."""
    connection, body = response.connection, response.content
    protocol = None if connection is None else connection.protocol  # an empty queue, thus false
    closed = None if protocol is None else protocol.closed

    def end(_: object) -> None:
        if not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection broke"))

    if closed is not None:
        closed.add_done_callback(end)
