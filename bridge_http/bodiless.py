"""HEAD is answered as GET is, without the body: by every route, whatever it is made of."""

from __future__ import annotations

from anyio import CancelScope
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """Has GET's route answer HEAD, and ends it at the first byte of a body that would go on: a
    stream may have no end. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        ended = False

        async def without_body(message: Message) -> None:
            nonlocal ended
            # Once answered it is a HEAD again, to the server too: it counts bytes of other bodies.
            scope["method"] = "HEAD"
            if message["type"] != "http.response.body":
                await send(message)
                return
            if not ended:
                ended = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            if message.get("more_body", False):
                going_on.cancel()

        scope["method"] = "GET"
        try:
            with CancelScope() as going_on:
                await self.app(scope, receive, without_body)
        finally:
            scope["method"] = "HEAD"
