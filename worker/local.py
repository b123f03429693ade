"""The local dispatcher: takes jobs straight from the database. Needs no queue."""

from __future__ import annotations

import threading
import time
from functools import partial

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log
from worker.execute import run_claim
from worker.gpus import Gpus
from worker.presence import Presence
from worker.reconcile import reconcile_forever
from worker.serving import announced, lease_of


def run_local(store: Store, settings: Settings, stop: threading.Event) -> None:
    """Runs jobs in `worker_slots` slots, in their order (`service.store.queues`), until `stop` is
    set; then lets the engines save, hands their jobs back and returns."""
    gpus = Gpus.of(settings)
    with (
        Presence(settings.home) as presence,
        announced(
            store,
            presence.name,
            gpus.queues,
            gpus=len(gpus.ids),
            slots=settings.worker_slots,
            lease=lease_of(settings),
        ),
    ):
        _take_over(store, presence)
        slots = [
            threading.Thread(
                target=_slot,
                args=(f"{presence.name}:{number}", store, settings, gpus, stop),
                name=f"slot-{number}",
            )
            for number in range(settings.worker_slots)
        ]
        for slot in slots:
            slot.start()
        reconcile_forever(store, settings, stop)
        for slot in slots:
            slot.join()


def _take_over(store: Store, presence: Presence) -> None:
    """Queues the jobs of this machine's dead workers again, at once: the one that this process was
    started to replace need not be waited for as long as its lease lasts.

    An engine that outlives its worker still keeps the run directory locked; see `rundir`.
    """
    try:
        for job_id in store.release_lost(presence.is_gone):
            log.warning("its worker had died, queued again", job=job_id)
    except StoreUnavailable as error:
        log.warning("cannot look for dead workers, their leases will run out", because=error)
    else:
        presence.forget_dead()


def _slot(
    worker_id: str, store: Store, settings: Settings, gpus: Gpus, stop: threading.Event
) -> None:
    """One job after the other."""
    quiet = True
    while not stop.is_set():
        since = time.monotonic()
        try:
            claim = gpus.claim(partial(store.claim_next, worker_id, settings.lease_seconds))
            quiet = True
            if claim is not None:
                try:
                    run_claim(claim, since=since, store=store, settings=settings, stop=stop)
                finally:
                    gpus.give_back(claim)
                continue
        except StoreUnavailable as error:
            if quiet:
                log.warning("cannot look for jobs, trying on", because=error)
            quiet = False
        except Exception:
            log.exception("slot failed", worker=worker_id)
            stop.wait(1)
        stop.wait(settings.poll_seconds)
