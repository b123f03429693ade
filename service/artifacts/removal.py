"""Removing what a deleted job has left: in the artifact store, in its run directory, in the tables.

In this order, and the job was marked before: wherever it is cut short, it can be done again, and
what was not removed is still named.
"""

from __future__ import annotations

import shutil

from service.artifacts.store import artifact_store
from service.settings import Settings
from service.store import Store


def remove(job_id: str, store: Store, settings: Settings) -> None:
    """Removes all that is left of a job that was marked as deleted (`Store.mark_deleted`).

    Raises ArtifactsUnavailable, StoreUnavailable, OSError: the rest is removed the next time. A run
    directory on another machine's own disk is not seen from here, and stays.
    """
    artifacts = artifact_store(settings.artifacts_url)
    if artifacts is not None:
        artifacts.delete(job_id)
    run = settings.run_dir(job_id)
    if run.exists():
        shutil.rmtree(run)
    store.forget(job_id, remains=artifacts is not None)
