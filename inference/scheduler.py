"""The one thread that computes: it takes turns between the base models that have work.

The event loop puts requests in and gets news out; it never waits for this thread. A line of waiting
requests is bounded: who comes when it is full is sent away at once, with a time to come back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict

from inference.batch import Batch, failure
from inference.errors import InferenceError
from inference.requests import Generation, Update

News = Update | InferenceError
log = logging.getLogger(__name__)


class Scheduler:
    """Runs the batches. `submit`, `cancel` and `drain` are for other threads and never wait."""

    def __init__(self, waiting: int = 64) -> None:
        """`waiting`: requests that may wait to be begun."""
        self.waiting = waiting
        self._work = threading.Condition()
        self._batches: list[Batch] = []
        self._draining = False
        self._closed = False
        self._news: defaultdict[asyncio.AbstractEventLoop, list[tuple[Generation, News]]] = (
            defaultdict(list)
        )
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    def submit(self, *generations: Generation) -> None:
        """Puts these, which were sent together, in line: all of them or none. They count as one, as
        several choices of one prompt do: else a request of many prompts could not be had while
        another waits, nor others while it does.

        Raises `InferenceError`: 429 when too many are waiting already, 503 when it is closing.
        """
        with self._work:
            if self._draining:
                raise shutting_down()
            if self._in_line() >= self.waiting:
                many = "1 request is" if self.waiting == 1 else f"{self.waiting} requests are"
                raise InferenceError(
                    f"{many} waiting already; try again in a few seconds.",
                    status=429,
                    type="RateLimitError",
                    retry_after=2,
                )
            for generation in generations:
                generation.request = generations[0].request
                generation.batch.waiting.append(generation)
                if generation.batch not in self._batches:
                    self._batches.append(generation.batch)
            self._work.notify()

    def cancel(self, *generations: Generation) -> None:
        """Nobody waits for these any more: they leave before the next token."""
        for generation in generations:
            generation.cancelled = True

    def figures(self) -> dict[str, int]:
        """How many requests wait, and how many are being written."""
        with self._work:
            running = {g.request for batch in self._batches for g in batch.running()}
            return {"waiting": self._in_line(), "running": len(running)}

    def drain(self) -> None:
        """Takes nothing new. What waits is sent away; what has begun goes on. For signal handlers
        too: it waits for no lock."""
        self._draining = True

    def close(self, seconds: float = 5.0) -> None:
        """Ends the thread; what has not ended within `seconds` is told so."""
        self.drain()
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._batches:
            time.sleep(0.02)
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join(timeout=5)

    def _in_line(self) -> int:
        waiting = (g for batch in self._batches for g in list(batch.waiting) if not g.cancelled)
        return len({g.request for g in waiting})

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._work:
                # Looks up now and then: a signal handler cannot notify.
                while not (self._batches or self._closed):
                    self._work.wait(0.5)
                batches = list(self._batches)
            if self._closed:
                break
            for batch in batches:
                if self._draining:
                    self._send_away(batch)
                self._advance(batch)
            self._deliver()
            with self._work:
                self._batches = [batch for batch in self._batches if not batch.idle]
            del batches, batch  # a base that is dropped meanwhile must be free to go
        for batch in self._batches:
            self._send_away(batch)
            batch.fail(shutting_down(), self._tell)
        self._deliver()

    def _advance(self, batch: Batch) -> None:
        try:
            batch.advance(self._tell)
        except Exception as error:
            log.exception("a batch of %d requests failed", len(batch.running()))
            batch.fail(failure(error), self._tell)

    def _send_away(self, batch: Batch) -> None:
        while batch.waiting:
            self._tell(batch.waiting.popleft(), shutting_down())

    def _tell(self, generation: Generation, news: News) -> None:
        if not generation.cancelled and generation.loop is not None:
            self._news[generation.loop].append((generation, news))

    def _deliver(self) -> None:
        """One call a step and event loop, however many rows there are."""
        for loop, items in self._news.items():
            try:
                loop.call_soon_threadsafe(_report, items)
            except RuntimeError:  # the loop has ended, and with it whoever waited
                log.info("%d news had no listener any more", len(items))
        self._news.clear()


def _report(items: list[tuple[Generation, News]]) -> None:
    for generation, news in items:
        generation.report([news])


def shutting_down() -> InferenceError:
    """What is said to those whom a restart turns away."""
    return InferenceError(
        "The inference process is shutting down; it is started again at once where it is "
        "supervised.",
        status=503,
        type="ServiceUnavailableError",
        retry_after=5,
    )
