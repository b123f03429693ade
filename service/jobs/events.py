"""A job's events as server-sent events: every one exactly once, in order, from wherever one left.

`seq` is the event's id, so a broken connection is resumed by the header `Last-Event-ID`, as every
EventSource sends it by itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import anyio
from anyio.to_thread import run_sync
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from service.jobs import feed as feeds
from service.jobs.feed import Feed, Feeds, Message, message
from service.store import Store, StoreUnavailable

KEEPALIVE_SECONDS = 10.0
"""A proxy or a client that hears nothing for long takes the connection for dead."""
RETRY_SECONDS = 0.3
"""Until the database is asked again, after it could not answer."""
CHUNK_BYTES = 1 << 16
"""What is handed to a connection at once."""


class EventStream(StreamingResponse):
    """Server-sent events that come ready to be sent: each is written once for all who follow."""

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncIterator[bytes], status_code: int = 200) -> None:
        # No cache and no proxy may hold back what is to be seen now.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(stream, status_code, headers=headers)


async def follow(
    everyone: Feeds, store: Store, job_id: str, after: int, stopping: threading.Event
) -> AsyncIterator[bytes]:
    """Events with a seq above `after`, those that are there and those that come; an event `end`
    with the job's status once the job has ended and all its events have been delivered.

    Stops without `end` when the service is `stopping`: the client comes back and goes on.
    """
    yield format_sse_event(comment="connected")
    async with everyone.follow(job_id) as feed:
        spoke = time.monotonic()
        while not stopping.is_set():
            # In this order: what changes from here on wakes us, or is seen below.
            changed, over, ended, floor = feed.changed, feed.over, feed.ended, feed.floor
            messages: Sequence[Message] | None = feed.since(after)
            if messages is None:
                messages = await _from_database(store, job_id, after, feed)
            for chunk in _chunks(messages or []):
                yield b"".join(message.frame for message in chunk)
                after, spoke = chunk[-1].seq, time.monotonic()
            if messages:
                continue  # there may be more already
            if messages is not None:
                after = max(after, floor or 0)  # the database knows of nothing before it
                if ended is not None:
                    yield _end(job_id, ended)
                if over:
                    return
            quiet = time.monotonic() - spoke
            if quiet >= KEEPALIVE_SECONDS:
                yield format_sse_event(comment="keep-alive")
                spoke, quiet = time.monotonic(), 0.0
            with anyio.move_on_after(
                RETRY_SECONDS if messages is None else KEEPALIVE_SECONDS - quiet
            ):
                await changed.wait()


async def _from_database(
    store: Store, job_id: str, after: int, feed: Feed
) -> Sequence[Message] | None:
    """The next events of one who is behind the feed; None if the database cannot tell now."""
    try:
        rows = await run_sync(
            store.events_after, job_id, after, feeds.BATCH, limiter=feed.catching_up
        )
    except StoreUnavailable:
        return None  # a passing trouble; the stream outlives it
    return [message(row) for row in rows]


def _chunks(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages in pieces worth a write each: a slow reader holds no more than one of them."""
    chunk: list[Message] = []
    size = 0
    for one in messages:
        chunk.append(one)
        size += len(one.frame)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _end(job_id: str, status: str) -> bytes:
    data = json.dumps({"job_id": job_id, "status": status})
    return format_sse_event(event="end", data_str=data)
