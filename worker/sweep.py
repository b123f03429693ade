"""Removes what no row names from the artifact store, and the remains of deleted jobs."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

from service.artifacts import ArtifactStore, ArtifactsUnavailable, artifact_store
from service.artifacts.removal import remove
from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log

SINCE = timedelta(days=2)
"""Jobs that ended longer ago have been swept, unless nobody swept for so long."""
EVERY_SECONDS = 3600.0
LINGERS_SECONDS = 86_400.0
"""No upload that began before its job was deleted, or before its job was written, takes longer."""


def sweep(store: Store, artifacts: ArtifactStore) -> int:
    """Deletes what attempts left behind that died while they published; how many publications.

    Safe at any time and from several processes: what a living attempt publishes is left alone.
    Raises ArtifactsUnavailable, StoreUnavailable.
    """
    deleted = 0
    for job_id in store.jobs_to_sweep(datetime.now(UTC) - SINCE):
        # looked up in this order: a row that is written in between names what is spared anyway
        for prefix in store.garbage(job_id, artifacts.publications(job_id)):
            artifacts.delete(prefix)
            deleted += 1
    return deleted


def sweep_remains(store: Store, artifacts: ArtifactStore) -> None:
    """Deletes what was published of jobs that were deleted meanwhile, or never came to be.

    Only what the database has noted, and a long time after: a store may serve several databases.
    Raises ArtifactsUnavailable, StoreUnavailable.
    """
    for prefix in store.remains(LINGERS_SECONDS):
        artifacts.delete(prefix)
        store.swept(prefix)


class Sweeper:
    """Sweeps every hour, in a thread: an artifact store may be slow."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._due = time.monotonic()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Starts a sweep if one is due."""
        if time.monotonic() >= self._due and (self._thread is None or not self._thread.is_alive()):
            self._due = time.monotonic() + EVERY_SECONDS
            self._thread = threading.Thread(target=self._sweep, name="sweep", daemon=True)
            self._thread.start()

    def _sweep(self) -> None:
        try:
            for job_id in self._store.deleted_jobs():
                remove(job_id, self._store, self._settings)
                log.info("removed what a deleted job had left", job=job_id)
            artifacts = artifact_store(self._settings.artifacts_url)
            if artifacts is None:
                return
            sweep_remains(self._store, artifacts)
            if deleted := sweep(self._store, artifacts):
                log.info("swept the artifact store", publications=deleted)
        except (ArtifactsUnavailable, StoreUnavailable, OSError) as error:
            log.warning("cannot sweep, next time", because=error)
        except Exception:
            log.exception("sweeping failed")
