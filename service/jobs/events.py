"""A job's events as server-sent events: every one exactly once, in order, from wherever one left.

The database is asked again a few times a second. `seq` is the event's id, so a broken connection is
resumed by the header `Last-Event-ID`, as every EventSource sends it by itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator

import anyio
from anyio.to_thread import run_sync
from fastapi.sse import ServerSentEvent

from service.store import Store
from service.store.errors import NotFound, StoreUnavailable
from service.store.models import EventRow

POLL_SECONDS = 0.3
KEEPALIVE_SECONDS = 10.0
"""A proxy or a client that hears nothing for long takes the connection for dead."""
BATCH = 500


async def follow(
    store: Store, job_id: str, after: int, stopping: threading.Event
) -> AsyncIterator[ServerSentEvent]:
    """Events with a seq above `after`, those that are there and those that come; an event `end`
    with the job's status once the job has ended and all its events have been delivered.

    Stops without `end` when the service is `stopping`: the client comes back and goes on.
    """
    # A thread of its own: no number of open streams can starve the other routes.
    limiter = anyio.CapacityLimiter(1)
    yield ServerSentEvent(comment="connected")
    spoke = time.monotonic()
    while not stopping.is_set():
        try:
            ended, rows = await run_sync(_look, store, job_id, after, limiter=limiter)
        except StoreUnavailable:
            ended, rows = None, []  # a passing trouble; the stream outlives it
        except NotFound:
            return
        for row in rows:
            yield ServerSentEvent(
                id=str(row.seq), event=row.type, raw_data=json.dumps(row.data, ensure_ascii=False)
            )
            after, spoke = row.seq, time.monotonic()
        if rows:
            continue  # there may be more already
        if ended is not None:
            yield ServerSentEvent(event="end", data={"job_id": job_id, "status": ended})
            return
        if time.monotonic() - spoke >= KEEPALIVE_SECONDS:
            yield ServerSentEvent(comment="keep-alive")
            spoke = time.monotonic()
        await anyio.sleep(POLL_SECONDS)


def _look(store: Store, job_id: str, after: int) -> tuple[str | None, list[EventRow]]:
    """The job's status if it has ended, and the next events. In this order: a status that was
    terminal before the look at the events proves that there are no more of them."""
    job = store.get_job(job_id)
    rows = store.events_after(job_id, after, BATCH)
    return (job.status if job.ended else None), list(rows)
