"""Makes true again what a crash has left half-done."""

from __future__ import annotations

import threading

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log
from worker.sweep import Sweeper


def reconcile(store: Store) -> list[str]:
    """Queues the jobs of lost workers again; their ids. Any number of processes may do this at the
    same time."""
    requeued = store.requeue_expired()
    for job_id in requeued:
        log.warning("lease ran out, queued again", job=job_id)
    return requeued


def reconcile_forever(store: Store, settings: Settings, stop: threading.Event) -> None:
    """Reconciles every few seconds until `stop` is set; a database out of reach is tried again."""
    sweeper = Sweeper(store, settings)
    while True:
        sweeper.look()
        try:
            reconcile(store)
        except StoreUnavailable as error:
            log.warning("cannot reconcile", because=error)
        except Exception:
            log.exception("reconciling failed")
        if stop.wait(settings.reconcile_seconds):
            return
