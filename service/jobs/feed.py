"""One look at the database for all who follow a job: a feed reads its new events once and wakes
every listener.

A feed begins with a job's first listener in this process and ends with the last. It keeps the
newest events, ready to be sent; whoever wants older ones (who comes late, or reads slowly) reads
them from the database. So nobody waits for anybody, nothing is lost, and what is kept has a bound.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import takewhile
from typing import NamedTuple

import anyio
from anyio.to_thread import run_sync
from fastapi.sse import format_sse_event

from service.store import NotFound, Store, StoreUnavailable
from service.store.models import EventRow

POLL_SECONDS = 0.3
BATCH = 500
"""Events read at once."""
CATCH_UPS = 8
"""Listeners of a job that read what is past from the database at the same time."""
KEEP_BYTES = 1 << 20
"""Of a job's newest events, as they are sent."""


class Message(NamedTuple):
    """An event as it goes over the wire."""

    seq: int
    frame: bytes


class Feed:
    """What is new of one job, for all its listeners on one event loop."""

    def __init__(self, store: Store, job_id: str, stopping: threading.Event) -> None:
        self.ended: str | None = None
        """The job's status, once it is the last one and all events have been read."""
        self.over = False
        """Nothing more will come: the job has ended or is gone, or the service stops."""
        self.listeners = 0
        self._store, self._job_id, self._stopping = store, job_id, stopping
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self.floor: int | None = None
        """The last event that is not kept: all later ones that have been read are. None: nothing
        has been read yet."""
        self._read = 0
        """The last event read."""
        self.changed = asyncio.Event()
        """Set as soon as there is something new to see; then there is another one."""
        # Threads of its own: no number of followed jobs can starve the other routes.
        self._limiter = anyio.CapacityLimiter(1)
        self.catching_up = anyio.CapacityLimiter(CATCH_UPS)

    def since(self, seq: int) -> list[Message] | None:
        """Events later than `seq` that have been read; None if some of them are not kept."""
        if self.floor is None or seq < self.floor:
            return None
        newer = list(takewhile(lambda message: message.seq > seq, reversed(self._messages)))
        return newer[::-1]

    async def run(self) -> None:
        """Reads until nothing more will come."""
        try:
            while not self.over:
                again = await self._look()
                if not again and not self.over:
                    await asyncio.sleep(POLL_SECONDS)
        finally:  # whatever happened: nobody waits for a feed that is no more
            self.over = True
            self._wake()

    async def _look(self) -> bool:
        """Reads what is new; True if there may be more already."""
        if self._stopping.is_set():
            self.over = True
            return False
        try:
            if self.floor is None:
                read = self._store.last_seq
                self._read = self.floor = await run_sync(read, self._job_id, limiter=self._limiter)
                self._wake()
            ended, rows = await run_sync(
                news, self._store, self._job_id, self._read, limiter=self._limiter
            )
        except StoreUnavailable:
            return False  # a passing trouble; the feed outlives it
        except NotFound:
            self.over = True
            return False
        for row in rows:
            self._keep(message(row))
        if rows:
            self._wake()
        elif ended is not None:
            self.ended, self.over = ended, True
        return bool(rows)

    def _keep(self, message: Message) -> None:
        self._messages.append(message)
        self._read = message.seq
        self._bytes += len(message.frame)
        while self._bytes > KEEP_BYTES:
            oldest = self._messages.popleft()
            self.floor, self._bytes = oldest.seq, self._bytes - len(oldest.frame)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Feeds:
    """The feeds of one application."""

    def __init__(self, store: Store, stopping: threading.Event) -> None:
        self._store, self._stopping = store, stopping
        # By event loop, too: what wakes a listener belongs to the one it waits on.
        self._feeds: dict[tuple[asyncio.AbstractEventLoop, str], Feed] = {}
        self._tasks: dict[Feed, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def follow(self, job_id: str) -> AsyncIterator[Feed]:
        """The job's feed, for one more listener."""
        place = (asyncio.get_running_loop(), job_id)
        feed = self._feeds.get(place)
        if feed is None or feed.over:
            feed = self._feeds[place] = Feed(self._store, job_id, self._stopping)
            self._tasks[feed] = asyncio.create_task(feed.run())
        feed.listeners += 1
        try:
            yield feed
        finally:
            feed.listeners -= 1
            if feed.listeners == 0:
                self._tasks.pop(feed).cancel()
                if self._feeds.get(place) is feed:
                    del self._feeds[place]

    def __len__(self) -> int:
        return len(self._feeds)


def news(store: Store, job_id: str, after: int) -> tuple[str | None, Sequence[EventRow]]:
    """The job's status if it has ended, and the next events. In this order: a status that was
    terminal before the look at the events proves that there are no more of them."""
    status = store.ended_as(job_id)
    return status, store.events_after(job_id, after, BATCH)


def message(row: EventRow) -> Message:
    """The event as a server-sent one."""
    data = json.dumps(row.data, ensure_ascii=False)
    return Message(row.seq, format_sse_event(id=str(row.seq), event=row.type, data_str=data))
