"""What many ask for at the same time, found out once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

Found = TypeVar("Found")


class Together(Generic[Found]):
    """Finds things out in threads. Nothing is kept: who asks while the same is being found out
    waits until it is found out anew, with all others who ask meanwhile. So what anybody gets was
    looked up after they asked, as if they had asked alone."""

    def __init__(self) -> None:
        self._next: dict[Hashable, asyncio.Task[Found]] = {}
        """Not begun yet."""
        self._begun: dict[Hashable, asyncio.Task[Found]] = {}

    async def find(self, what: Hashable, look: Callable[[], Found]) -> Found:
        """The result of `look`, or of another's of the same name; or what it raised."""
        task = self._next.get(what)
        if task is None:
            task = self._next[what] = asyncio.create_task(self._find(what, look))
        return await asyncio.shield(task)  # it goes on for the others when one hangs up

    async def _find(self, what: Hashable, look: Callable[[], Found]) -> Found:
        if (before := self._begun.get(what)) is not None:
            await asyncio.wait([before])
        self._begun[what] = self._next.pop(what)
        try:
            return await run_in_threadpool(look)
        finally:
            del self._begun[what]
