"""A run's events on their way from its directory into the database."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from bridge_engine.events import Checkpoint, Done, Event, EventReader, Failed, Phase, Stopped, parse
from service.store import Artifact, Claim, Store, StoreUnavailable
from worker import log
from worker.publish import Publisher

BATCH = 500
"""Events a transaction: small enough that a heartbeat never waits long for the write lock."""
AHEAD = 2000
"""Events that are read while those before them wait."""

Ending = Done | Failed | Stopped


class Forwarder:
    """Forwards each event once, in order; keeps what the database could not take."""

    def __init__(
        self, store: Store, claim: Claim, run: Path, publisher: Publisher | None = None
    ) -> None:
        """With a `publisher`, what a checkpoint names is published before its event goes out."""
        self._store = store
        self._claim = claim
        self._run = run
        self._publisher = publisher
        seq = store.last_seq(claim.job.id)
        self._reader = EventReader(run / "events.jsonl", seq)
        self._waiting: list[Event] = []
        self.out_of_reach = False
        """The database could not take the last batch."""
        self.publishing = False
        """The next event is a checkpoint's, which is on its way into the artifact store."""
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
        if len(self._waiting) < AHEAD:  # also while a checkpoint is on its way
            if fresh := self._reader.read(BATCH):
                self.heard_now()
                for event in fresh:
                    self._look_at(event)
                self._waiting += fresh
            elif not self._waiting:
                return False
        else:
            self.heard_now()  # nobody listens now: its silence is ours
        batch, artifacts = self._publishable()
        self.publishing = not batch
        if self.publishing:
            return True
        job_id = self._claim.job.id
        try:
            self._store.append_events(job_id, self._claim.attempt, batch, artifacts)
            if isinstance(batch[-1], Checkpoint):
                self._retain()
        except StoreUnavailable as error:
            if not self.out_of_reach:
                log.warning("events wait", job=job_id, because=error)
            self.out_of_reach = True
            self.heard_now()  # nobody listens now: its silence is ours
            return True
        if self.out_of_reach:
            log.info("events flow again", job=job_id)
        self.out_of_reach = False
        self._waiting = self._waiting[len(batch) :]
        return True

    def _publishable(self) -> tuple[list[Event], list[Artifact]]:
        """The events up to the next checkpoint, or with it and what it left in the artifact store;
        none while it is on its way there."""
        waiting = self._waiting[:BATCH]
        at = next((i for i, event in enumerate(waiting) if isinstance(event, Checkpoint)), None)
        if at is None:
            return waiting, []
        checkpoint = waiting[at]
        if self._publisher is None or not isinstance(checkpoint, Checkpoint):
            return waiting[: at + 1], []
        artifacts = self._publisher.published(checkpoint)
        return (waiting[:at], []) if artifacts is None else (waiting[: at + 1], artifacts)

    def _retain(self) -> None:
        """Removes what the spec does not keep, now that there is a newer one."""
        dropped = self._store.retain(self._claim.job.id, self._claim.attempt)
        for path in dropped.paths:
            shutil.rmtree(self._run / path, ignore_errors=True)
        if self._publisher is not None:
            self._publisher.delete(dropped.prefixes)

    def silence(self) -> float:
        """Seconds in which nothing was heard, though somebody listened."""
        return time.monotonic() - self._heard

    def heard_now(self) -> None:
        """Its silence begins anew."""
        self._heard = time.monotonic()

    def _look_at(self, event: Event) -> None:
        self.ending = event if isinstance(event, Ending) else None
        if isinstance(event, Failed) and event.seq <= self._claim.job.retried_seq:
            self.ending = None  # its owner has had it tried again since then
        step = getattr(event, "step", None)
        self.step = self.step if step is None else max(step, 0)
        if isinstance(event, Phase):
            self.phase = event.phase
