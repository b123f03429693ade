"""Nobody is written for who has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import ApiError

Result = TypeVar("Result")


async def unless_hung_up(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is given up when the client leaves. The body must have been
    read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(400, "hung_up", "the client hung up")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `close` is awaited however it ends, even before it began."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close
        self.at_the_end = ExitStack()
        """What is given back then."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The whole of it."""
        with self.at_the_end:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await asyncio.shield(self._close())
