"""A Celery worker that hears nothing looks into the database itself.

After a broker's restart a worker may consume no more, though its process lives and looks well
(celery#8091, #10205, #10302); and a broker may be down for hours. The queue is a hint, so jobs need
not wait for it: a worker with a free slot takes those that have waited for too long, slowly, one
at a time, by the very claim that a message leads to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log
from worker.gpus import Gpus


class Slots:
    """The jobs that this worker may run at the same time, however it came to hear of them."""

    def __init__(self, limit: int) -> None:
        self._changed = threading.Condition()
        self._limit = limit
        self._busy = 0
        self._quiet_since = time.monotonic()

    def limit(self, limit: int) -> None:
        """There are this many."""
        self._limit = limit

    def heard(self) -> None:
        """A message came: somebody talks to us."""
        self._quiet_since = time.monotonic()

    def idle_seconds(self) -> float:
        """For how long a slot has been free while nothing was heard; 0 if none is."""
        return time.monotonic() - self._quiet_since if self._busy < self._limit else 0.0

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Holds a slot for the block; False if there was none, and then none is held."""
        with self._changed:
            free = self._busy < self._limit
            self._busy += free
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._busy -= 1
                    self.heard()  # the next message had no slot to come to until now
                    self._changed.notify_all()

    def wait_until_free(self, seconds: float) -> bool:
        """Waits until no slot is taken; was it so within the time?"""
        with self._changed:
            return self._changed.wait_for(lambda: self._busy == 0, seconds)


def look_out(
    store: Callable[[], Store],
    worker_id: str,
    gpus: Gpus,
    settings: Settings,
    slots: Slots,
    stop: threading.Event,
    run: Callable[[str], object],
) -> threading.Thread:
    """Looks from a thread of its own until `stop` is set; `run` takes the job of an id."""
    thread = threading.Thread(
        target=_look,
        args=(store, worker_id, gpus, settings, slots, stop, run),
        name="lookout",
        daemon=True,
    )
    thread.start()
    return thread


def _look(
    store: Callable[[], Store],
    worker_id: str,
    gpus: Gpus,
    settings: Settings,
    slots: Slots,
    stop: threading.Event,
    run: Callable[[str], object],
) -> None:
    patience = settings.silence_seconds
    while not stop.wait(patience / 4):
        if slots.idle_seconds() < patience:
            continue
        try:
            job_id = store().overdue_job(patience, worker_id, gpus.offer())
        except StoreUnavailable as error:
            log.warning("cannot look for jobs", because=error)
            continue
        except Exception:
            log.exception("looking for jobs failed")
            continue
        if job_id is not None:
            log.warning(
                "heard nothing though a job waits, taking it from the database",
                job=job_id,
                silent_s=round(slots.idle_seconds()),
            )
            name = f"lookout-{job_id}"
            threading.Thread(target=_take, args=(job_id, slots, run), name=name).start()


def _take(job_id: str, slots: Slots, run: Callable[[str], object]) -> None:
    with slots.taken() as free:
        if not free:
            return
        try:
            run(job_id)
        except StoreUnavailable as error:
            log.warning("could not take the job", job=job_id, because=error)
        except Exception:
            log.exception("the job that was found failed", job=job_id)
