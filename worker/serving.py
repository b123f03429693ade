"""Says who serves what: a worker's row in the database, for as long as it lives.

A job that nobody can serve says so (`waiting_for`), and this is how that is known.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log


@contextmanager
def announced(
    store: Store, worker_id: str, queues: Sequence[str], *, gpus: int, slots: int, lease: float
) -> Iterator[None]:
    """Within: this worker is known to live; `lease` seconds after its death no more."""
    left = threading.Event()

    def announce() -> None:
        quiet = True
        while True:
            try:
                store.announce_worker(worker_id, queues, gpus=gpus, slots=slots, seconds=lease)
                quiet = True
            except StoreUnavailable as error:
                if quiet:
                    log.warning("cannot say that I live, trying on", because=error)
                quiet = False
            except Exception:
                log.exception("announcing failed", worker=worker_id)
            if left.wait(lease / 3):
                return

    thread = threading.Thread(target=announce, name="announce", daemon=True)
    thread.start()
    log.info("serving", worker=worker_id, queues=",".join(queues), gpus=gpus)
    try:
        yield
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(StoreUnavailable):
            store.retire_worker(worker_id)


def lease_of(settings: Settings) -> float:
    """Seconds that a worker's word is good for."""
    return max(settings.lease_seconds, 3 * settings.heartbeat_seconds)
