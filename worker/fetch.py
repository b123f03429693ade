"""Going on with a job whose newest checkpoint lies in the artifact store and not on this machine.

The database says how far the run has come: its events, and the checkpoints that were published
with them. A run directory that holds other events than the database was left behind when the job
went on elsewhere: what it knows beyond the store's checkpoints belongs to a line that was given up,
and the figures between the two would be missing if an engine went on from there. So it is cleared.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.events import EventReader, Log, parse
from bridge_engine.state.checkpoint import MANIFEST, is_whole, newest_whole, sha256_of, step_of
from bridge_engine.state.initial_parameters import FOLDER
from service.artifacts import ArtifactStore, Damaged, Stored
from service.store import JobRow, Store
from worker import log
from worker.patience import Patience


def fetch(
    run: Path,
    job: JobRow,
    store: Store,
    artifacts: ArtifactStore,
    patience: Patience,
) -> list[Log]:
    """Sees to it that the newest checkpoint that can be had lies in the run directory; what there
    is to tell about it. The events come after it (`rundir.prepare`).

    Raises EngineError (`artifacts_unavailable`, `disk_full`).
    """
    _fetch_beginning(run, job, store, artifacts, patience)
    published = store.states(job.id)
    if _went_on_elsewhere(run / "events.jsonl", job.id, store):
        log.info("the run went on elsewhere, its directory here is cleared", job=job.id)
        _clear(run, {row.path: row.sha256 for row in published})
    newest, _ = newest_whole(run / "checkpoints")
    notes: list[Log] = []
    for row in published:
        if newest is not None and (step_of(newest.name) or 0) >= row.step:
            return notes
        stored = Stored(row.prefix, row.sha256, row.bytes)
        try:
            patience(partial(artifacts.get, stored, run / row.path))
        except Damaged as error:
            log.warning("a published checkpoint is damaged", job=job.id, because=error.message)
            text = f"checkpoint of step {row.step} in the artifact store: {error.message}; going "
            notes.append(Log(level="warning", message=text + "back one further"))
        else:
            log.info("checkpoint fetched", job=job.id, step=row.step, bytes=row.bytes)
            text = f"checkpoint of step {row.step} was fetched from the artifact store"
            return [*notes, Log(message=text)]
    return notes


def _fetch_beginning(
    run: Path, job: JobRow, store: Store, artifacts: ArtifactStore, patience: Patience
) -> None:
    """What this job starts from, if it was published with it: another one's checkpoint, adapter or
    answers."""
    row = store.artifact(job.id, FOLDER)
    if row is not None and not is_whole(run / FOLDER):
        stored = Stored(row.prefix, row.sha256, row.bytes)
        try:
            patience(partial(artifacts.get, stored, run / FOLDER))
        except Damaged as error:  # the engine says what this means for the job
            log.warning("what the job starts from is damaged", job=job.id, because=error.message)


def _went_on_elsewhere(path: Path, job_id: str, store: Store) -> bool:
    """Is the database's last event not in the file, or another one there?"""
    seq = store.last_seq(job_id)
    if seq == 0:
        return False
    known = parse(json.dumps(store.events_after(job_id, seq - 1, limit=1)[0].data))
    here = EventReader(path, after_seq=seq - 1).read(limit=1)
    return not here or (here[0].seq, here[0].time) != (known.seq, known.time)


def _clear(run: Path, published: dict[str, str]) -> None:
    """Removes the events, which the database has, the answers of an evaluation, which its
    checkpoints have, and every checkpoint but those that lie in the store to the same byte."""
    for name in ("events.jsonl", "metrics.jsonl", COMPLETIONS):
        (run / name).unlink(missing_ok=True)
    for folder in (run / "checkpoints").glob("step-*"):
        same = published.get(f"checkpoints/{folder.name}")
        if same is None or not is_whole(folder) or sha256_of(folder / MANIFEST) != same:
            shutil.rmtree(folder)
