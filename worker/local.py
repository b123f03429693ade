"""The local dispatcher: takes jobs straight from the database. Needs no queue."""

from __future__ import annotations

import os
import socket
import threading
import time

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log
from worker.execute import run_claim
from worker.reconcile import reconcile_forever


def worker_name(slot: int | str) -> str:
    """Which worker this is, for people and for the job's record."""
    return f"{socket.gethostname()}:{os.getpid()}:{slot}"


def run_local(store: Store, settings: Settings, stop: threading.Event) -> None:
    """Runs jobs in `worker_slots` slots, oldest first, until `stop` is set; then lets the engines
    save, hands their jobs back and returns."""
    slots = [
        threading.Thread(target=_slot, args=(number, store, settings, stop), name=f"slot-{number}")
        for number in range(settings.worker_slots)
    ]
    for slot in slots:
        slot.start()
    reconcile_forever(store, settings, stop)
    for slot in slots:
        slot.join()


def _slot(number: int, store: Store, settings: Settings, stop: threading.Event) -> None:
    """One job after the other."""
    quiet = True
    while not stop.is_set():
        since = time.monotonic()
        try:
            claim = store.claim_next(worker_name(number), settings.lease_seconds)
            quiet = True
            if claim is not None:
                run_claim(claim, since=since, store=store, settings=settings, stop=stop)
                continue
        except StoreUnavailable as error:
            if quiet:
                log.warning("cannot look for jobs, trying on", because=error)
            quiet = False
        except Exception:
            log.exception("slot failed", slot=number)
            stop.wait(1)
        stop.wait(settings.poll_seconds)
