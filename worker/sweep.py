"""Removes from the artifact store what no row names, and the remains of deleted jobs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from service.artifacts import ArtifactStore
from service.store import Store

SINCE = timedelta(days=2)
"""Jobs that ended longer ago have been swept, unless nobody swept for so long."""


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
