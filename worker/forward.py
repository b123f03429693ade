"""A run's events on their way from its directory into the database."""

from __future__ import annotations

import json
import time
from pathlib import Path

from bridge_engine.events import Done, Event, EventReader, Failed, Phase, Stopped, parse
from service.store import Claim, Store, StoreUnavailable
from worker import log

BATCH = 500
"""Events a transaction: small enough that a heartbeat never waits long for the write lock."""

Ending = Done | Failed | Stopped


class Forwarder:
    """Forwards each event once, in order; keeps what the database could not take."""

    def __init__(self, store: Store, claim: Claim, run: Path) -> None:
        self._store = store
        self._claim = claim
        seq = store.last_seq(claim.job.id)
        self._reader = EventReader(run / "events.jsonl", seq)
        self._waiting: list[Event] = []
        self.out_of_reach = False
        """The database could not take the last batch."""
        self.ending: Ending | None = None
        """The run's last word: set while the last event known is one."""
        self.step = claim.job.progress_step
        """The step that was last heard of."""
        self.phase = "starting"
        """The phase that was last heard of."""
        self.heard_now()
        for stored in store.events_after(claim.job.id, seq - 1):
            self._look_at(parse(json.dumps(stored.data)))

    def pump(self) -> bool:
        """Forwards a batch; False when there is nothing left to forward, True to come again.

        Raises StaleAttempt. A database that is out of reach is not an error here: the events wait.
        """
        if not self._waiting:
            self._waiting = self._reader.read(BATCH)
            if not self._waiting:
                return False
            self.heard_now()
            for event in self._waiting:
                self._look_at(event)
        job_id = self._claim.job.id
        try:
            self._store.append_events(job_id, self._claim.attempt, self._waiting)
        except StoreUnavailable as error:
            if not self.out_of_reach:
                log.warning("events wait", job=job_id, because=error)
            self.out_of_reach = True
            self.heard_now()  # nobody listens now: its silence is ours
            return True
        if self.out_of_reach:
            log.info("events flow again", job=job_id)
        self.out_of_reach = False
        self._waiting = []
        return True

    def silence(self) -> float:
        """Seconds in which nothing was heard, though somebody listened."""
        return time.monotonic() - self._heard

    def heard_now(self) -> None:
        """Its silence begins anew."""
        self._heard = time.monotonic()

    def _look_at(self, event: Event) -> None:
        self.ending = event if isinstance(event, Ending) else None
        step = getattr(event, "step", None)
        self.step = self.step if step is None else max(step, 0)
        if isinstance(event, Phase):
            self.phase = event.phase
