"""Keeping a claimed job: the heartbeat, and noticing when the job is no longer ours."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from bridge_engine.process import failpoints
from bridge_engine.process.lifeline import Deadline
from service.settings import Settings
from service.store import Claim, StaleAttempt, Store, StoreUnavailable
from worker import log

LOOK_SECONDS = 1.0
"""Longest time between looks at what the job's owner wants. A look is a read and costs nobody the
write lock; a heartbeat writes, and may come much more rarely."""


class Lease:
    """Renews a claim's lease from a thread of its own, so that nothing else can hold it up.

    `lost` also becomes true by our own clock, when no renewal has come through for as long as a
    lease lasts: from then on another worker may own the job, whether or not we can reach the
    database to hear of it. Who holds the lease must stop touching the run directory at once. The
    engine is held to the same moment by itself (`deadline`), should this process stand still.
    """

    def __init__(self, store: Store, claim: Claim, settings: Settings, *, since: float) -> None:
        self._store = store
        self._claim = claim
        self._settings = settings
        self._renewed = since
        """`time.monotonic()` from before the last renewal was asked for: the safe side."""
        self.deadline = Deadline.create(since + settings.lease_seconds)
        """The moment until when the job is certainly ours, for the engine to see."""
        self._fenced = False
        self._wanted = claim.job.wanted
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{claim.job.id}")

    @property
    def lost(self) -> bool:
        """The job is, or may be, another attempt's."""
        return self._fenced or time.monotonic() - self._renewed > self._settings.lease_seconds

    @property
    def stop_wanted(self) -> bool:
        """The job's owner wants it to stop, for now (a pause) or for good."""
        return self._wanted != "run"

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()
        self.deadline.close()

    def _beat(self) -> None:
        job_id, attempt = self._claim.job.id, self._claim.attempt
        every = self._settings.heartbeat_seconds
        beat_at = time.monotonic() + every
        while not self._left.wait(min(LOOK_SECONDS, max(0.0, beat_at - time.monotonic()))):
            asked = time.monotonic()
            due = asked >= beat_at
            try:
                if due:
                    failpoints.reached("before_heartbeat")
                    beat_at = asked + every  # also after a beat that does not come through
                    self._wanted = self._store.heartbeat(
                        job_id, attempt, self._settings.lease_seconds
                    )
                    self._renewed = asked
                    self.deadline.set(asked + self._settings.lease_seconds)
                else:
                    self._wanted = self._store.wanted(job_id, attempt)
            except StaleAttempt:
                self._fenced = True
                self.deadline.set(0)
                return
            except StoreUnavailable as error:
                if due:
                    log.warning("heartbeat missed", job=job_id, attempt=attempt, because=error)
            except Exception:
                log.exception("heartbeat failed", job=job_id, attempt=attempt)
