"""What the routes that ask a model have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from service.body import read_body
from service.errors import ApiError
from service.generate.hanging_up import EventStream
from service.generate.serving import Serving
from service.parameters import known_parameters

AT_ONCE = 256
"""Requests that may wait for inference at the same time. Waiting costs a connection and no thread;
the inference process has a line of its own and says when that is full."""

Body = Annotated[tuple[bytes, str], Depends(read_body)]


def serving_of(request: Request) -> Serving:
    """The application's."""
    return cast(Serving, request.app.state.serving)


class AskingRoute(APIRoute):
    """A route whose function takes the request and its body, and is called when there is a place
    for it, which an answer that is streamed holds to its end.

    FastAPI works out anew for each request what a function depends on, which took as long as all
    that is done here for an answer of vLLM's. So this does the same without asking: it refuses
    query parameters, as there are none, reads the body, and takes a place. It heeds no dependency,
    neither of its own, with which it refuses to be made, nor of a router or the application: what
    every request is to pass belongs here.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own way to replace what handles a request."""
        ask = self.endpoint
        unheeded = [d.call for d in self.dependant.dependencies if d.call is not read_body]
        if unheeded:
            raise TypeError(f"{self.path} depends on {unheeded}, which AskingRoute does not do")

        async def handle(request: Request) -> Response:
            await known_parameters(request)
            body = await read_body(request)
            places = cast(threading.BoundedSemaphore, request.app.state.generations)
            # Taken once the body is there: who sends slowly keeps nobody waiting.
            if not places.acquire(blocking=False):
                raise ApiError(
                    429,
                    "too_many_generations",
                    f"{AT_ONCE} generations are running or waiting already; try again in a few "
                    "seconds",
                    headers={"Retry-After": "2"},
                )
            with ExitStack() as at_the_end:
                at_the_end.callback(places.release)
                response: Response = await ask(request, body)
                if isinstance(response, EventStream):
                    response.at_the_end = at_the_end.pop_all()
            return response

        return handle
