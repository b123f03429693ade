"""One thread that does all of torch's work, behind a queue that says no when it is full."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from inference.errors import InferenceError

Result = TypeVar("Result")
Item = tuple[Future[Any], Callable[[], object]]
log = logging.getLogger(__name__)


class GenerationThread:
    """Runs callables one after another, in the order they came."""

    def __init__(self, waiting: int = 64) -> None:
        self._queue: queue.Queue[Item | None] = queue.Queue(waiting)
        self.waiting = waiting
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, run on the generation thread. Waiting costs no thread, so the
        server answers others meanwhile.

        Raises `InferenceError`: 429 at once when too many are waiting already, 503 when closed.
        """
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queues `work`; see `call`."""
        future: Future[Result] = Future()
        if self._closed:
            raise _shutting_down()
        try:
            self._queue.put_nowait((future, work))
        except queue.Full:
            raise InferenceError(
                f"{self.waiting} requests are waiting already; try again in a few seconds.",
                status=429,
                type="RateLimitError",
                retry_after=2,
            ) from None
        return future

    def close(self) -> None:
        """Lets the running request finish and ends the thread."""
        self._closed = True
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item[0].set_exception(_shutting_down())
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue  # whoever asked has hung up
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is belongs to the caller, not the thread
                if not isinstance(error, InferenceError):
                    log.exception("generation failed")
                future.set_exception(error)


def _shutting_down() -> InferenceError:
    return InferenceError(
        "The inference process is shutting down.",
        status=503,
        type="ServiceUnavailableError",
        retry_after=5,
    )
