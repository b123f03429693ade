"""A client's connection to the service: sends what is asked and asks again, page after page. The
twins beside each other, one for each client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from bridge_client import _core, _given
from bridge_client._core import Call, Retry, check
from bridge_client.models import Page, Record

T = TypeVar("T")
R = TypeVar("R", bound=Record)


class Connection:
    """Where `Client` sends its requests."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        project: str | None = None,
        timeout: float | httpx.Timeout = _core.DEFAULT_TIMEOUT,
        retries: int = _core.RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = _given.address(base_url or _core.default_url())
        self._retries = retries
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=timeout,
            headers=_core.project_header(project),
            transport=transport,
            trust_env=not _given.is_loopback(self.base_url),
        )

    def close(self) -> None:
        """Closes the connections it keeps open."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        retry = Retry(call, self.base_url, self._retries)
        while True:
            try:
                with call.arguments() as arguments:
                    response = self._http.request(call.method, call.path, **arguments)
            except httpx.TransportError as error:
                delay = retry.after_error(error)
            else:
                again = retry.after_response(response)
                if again is None:
                    return call.read(response)
                delay = again
            time.sleep(delay)

    def _pieces(self, call: Call[Any], begin: Callable[[httpx.Response], None]) -> Iterator[bytes]:
        """An answer as it comes. `begin` is told of each try: what comes then is from the start."""
        retry = Retry(call, self.base_url, self._retries)
        while True:
            try:
                with self._http.stream("GET", call.path, timeout=call.timeout) as response:
                    again = retry.after_response(response)
                    if again is None:
                        if not response.is_success:
                            response.read()
                        check(response)
                        begin(response)
                        yield from response.iter_bytes()
                        return
                    delay = again
            except httpx.TransportError as error:
                delay = retry.after_error(error)
            time.sleep(delay)

    def _all(self, page_of: Callable[..., Call[Page[R]]], query: dict[str, Any]) -> Iterator[R]:
        """Every item of a list, page after page."""
        after: str | None = None
        while True:
            page = self._send(page_of(after=after, **query))
            yield from page.data
            after = page.next
            if after is None:
                return


class AsyncConnection:
    """The same for `AsyncClient`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        project: str | None = None,
        timeout: float | httpx.Timeout = _core.DEFAULT_TIMEOUT,
        retries: int = _core.RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = _given.address(base_url or _core.default_url())
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            timeout=timeout,
            headers=_core.project_header(project),
            transport=transport,
            trust_env=not _given.is_loopback(self.base_url),
        )

    async def close(self) -> None:
        """Closes the connections it keeps open."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        retry = Retry(call, self.base_url, self._retries)
        while True:
            try:
                with call.arguments() as arguments:
                    response = await self._http.request(call.method, call.path, **arguments)
            except httpx.TransportError as error:
                delay = retry.after_error(error)
            else:
                again = retry.after_response(response)
                if again is None:
                    return call.read(response)
                delay = again
            await asyncio.sleep(delay)

    async def _pieces(
        self, call: Call[Any], begin: Callable[[httpx.Response], None]
    ) -> AsyncIterator[bytes]:
        """An answer as it comes. `begin` is told of each try: what comes then is from the start."""
        retry = Retry(call, self.base_url, self._retries)
        while True:
            try:
                async with self._http.stream("GET", call.path, timeout=call.timeout) as response:
                    again = retry.after_response(response)
                    if again is None:
                        if not response.is_success:
                            await response.aread()
                        check(response)
                        begin(response)
                        async for piece in response.aiter_bytes():
                            yield piece
                        return
                    delay = again
            except httpx.TransportError as error:
                delay = retry.after_error(error)
            await asyncio.sleep(delay)

    async def _all(
        self, page_of: Callable[..., Call[Page[R]]], query: dict[str, Any]
    ) -> AsyncIterator[R]:
        """Every item of a list, page after page."""
        after: str | None = None
        while True:
            page = await self._send(page_of(after=after, **query))
            for item in page.data:
                yield item
            after = page.next
            if after is None:
                return
