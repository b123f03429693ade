"""Checkpoints on their way into the artifact store, beside the run that makes more of them.

An event that speaks of a checkpoint is forwarded only once all it names lies in the store, and the
rows that name it are written in the event's own transaction. Until then the events after it wait in
the run directory: an event's place in the stream is final, so none may overtake another. The engine
trains on meanwhile, and the lease is renewed by a thread of its own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.events import Checkpoint, EventWriter, Log
from bridge_engine.state.checkpoint import MANIFEST, sha256_of
from service.artifacts import ArtifactStore, ArtifactsUnavailable, Damaged, Stored, artifact_store
from service.settings import Settings
from service.store import Artifact, Claim, Store, StoreUnavailable
from service.store.artifacts import publication
from worker import log
from worker.fetch import fetch
from worker.lease import Lease
from worker.patience import Patience

PIN = ".publishing"
"""Folder, one an attempt, of hard links to what is being published: the engine may prune the
original meanwhile."""


class Publisher:
    """Publishes one checkpoint at a time, in a thread. Leaving the `with` block gives up."""

    def __init__(
        self,
        artifacts: ArtifactStore,
        store: Store,
        claim: Claim,
        run: Path,
        patience: float,
        lease: Lease,
    ) -> None:
        self._artifacts = artifacts
        self._store = store
        self._claim = claim
        self._run = run
        self._patience = Patience(patience, self._given_up)
        self._lease = lease
        self._left = threading.Event()
        self._seq = 0
        self._thread: threading.Thread | None = None
        self._answer: list[Artifact] | EngineError | None = None
        # An earlier attempt's upload may still be on its way out: it must not touch ours.
        self._pins = run / f"{PIN}-{claim.attempt}"

    def __enter__(self) -> Publisher:
        for left in self._run.glob(f"{PIN}-*"):
            shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join(1.0)  # a request on its way ends by its own timeout, unheard

    def fetch(self) -> list[Log]:
        """Brings the newest checkpoint here, if it is not; what there is to tell about it."""
        job = self._claim.job
        self._patience(self._artifacts.check)  # rather than at the first checkpoint
        return fetch(self._run, job, self._store, self._artifacts, self._patience)

    def published(self, event: Checkpoint) -> list[Artifact] | None:
        """What the event names, once all of it lies in the store; None until then.

        Raises EngineError: `artifacts_unavailable` after a long while of trying, `damaged_export`.
        """
        if self._seq != event.seq:
            self._seq, self._answer = event.seq, None
            self._thread = threading.Thread(
                target=self._work, args=(event,), name=f"publish-{self._claim.job.id}", daemon=True
            )
            self._thread.start()
        if isinstance(self._answer, EngineError):
            error, self._seq, self._answer = self._answer, 0, None
            raise error
        return self._answer

    def delete(self, prefixes: Sequence[str]) -> None:
        """Deletes publications that no row names any more, in a thread; what fails is left to the
        sweep (`worker.sweep`)."""

        def work() -> None:
            try:
                for prefix in prefixes:
                    self._artifacts.delete(prefix)
            except ArtifactsUnavailable as error:
                log.warning("old artifacts stay for now", because=error)

        if prefixes:
            threading.Thread(target=work, daemon=True).start()

    def _given_up(self) -> bool:
        return self._left.is_set() or self._lease.lost

    def _work(self, event: Checkpoint) -> None:
        began = time.monotonic()
        try:
            answer = [
                Artifact(path, event.step, stored.prefix, stored.sha256, stored.bytes)
                for path in _named(event)
                if (stored := self._publish(path, is_state=path == event.path)) is not None
            ]
        except EngineError as error:
            self._answer = error
        except Exception as error:
            log.exception("publishing failed", job=self._claim.job.id)
            self._answer = EngineError(
                f"publishing step {event.step} failed: {type(error).__name__}: {error}",
                code="publishing_failed",
                category="internal",
                retryable=True,
            )
        else:
            seconds = round(time.monotonic() - began, 2)
            log.info("published", job=self._claim.job.id, step=event.step, seconds=seconds)
            self._answer = answer
        finally:
            shutil.rmtree(self._pins, ignore_errors=True)

    def _publish(self, path: str, *, is_state: bool) -> Stored | None:
        """One folder; None for a state that newer ones have replaced already."""
        folder = self._pins / path
        try:
            _link(self._run / path, folder)
            sha256 = sha256_of(folder / MANIFEST)
        except OSError as error:
            if is_state:
                log.warning(
                    "a state was replaced before it could be published; save less often "
                    "(checkpoint.every) or keep more of them (checkpoint.keep)",
                    job=self._claim.job.id,
                    state=path,
                )
                return None
            raise _damaged(f"{self._run / path} cannot be read: {error.strerror}") from error
        job_id, attempt = self._claim.job.id, self._claim.attempt

        def put() -> Stored:
            try:
                known = self._store.artifact(job_id, path)
            except StoreUnavailable as error:
                raise ArtifactsUnavailable(error.message) from error
            if known is not None and known.sha256 == sha256:  # said again after a resume
                return Stored(known.prefix, known.sha256, known.bytes)
            prefix = publication(job_id, path, attempt, sha256)
            return self._artifacts.put(folder, prefix, lambda: not self._given_up())

        try:
            return self._patience(put)
        except Damaged as error:
            if is_state:
                log.warning("a state is damaged, not published", because=error.message)
                return None
            raise _damaged(error.message) from error


@contextmanager
def publishing(
    store: Store, claim: Claim, run: Path, settings: Settings, lease: Lease
) -> Iterator[Publisher | None]:
    """The publisher of an attempt; None where the run directories are the artifact store."""
    artifacts = artifact_store(settings.artifacts_url)
    if artifacts is None:
        yield None
        return
    patience = settings.artifacts_patience_seconds
    with Publisher(artifacts, store, claim, run, patience, lease) as publisher:
        yield publisher


def tell(run: Path, notes: Sequence[Log]) -> None:
    """Puts the notes into the run's events, before an engine goes on with them."""
    if notes:
        writer = EventWriter(run)
        for note in notes:
            writer.emit(note)


def _named(event: Checkpoint) -> list[str]:
    """The folders that the event speaks of; the state first, which is the first to be pruned."""
    named = [event.path, event.adapter, event.student, event.merged, event.merged_student]
    return [path for path in named if path]


def _link(source: Path, target: Path) -> None:
    """Hard links to a folder's files: their bytes stay, whatever becomes of the folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except PermissionError:  # a file system without hard links
            shutil.copyfile(path, target / path.name)


def _damaged(message: str) -> EngineError:
    return EngineError(message, code="damaged_export", category="infra", retryable=True)
