"""A job that starts from another one's checkpoint: which checkpoint, whether it fits, and a copy.

With an artifact store, the checkpoint may lie there alone, and the copy is published too: the
worker that gets the job may be on another machine.

The copy is made before the job is there, so that nothing that becomes of the other job can take it
away between the request and the start. Its files are hard links where the file system has them:
a published checkpoint is never changed, only deleted, and the last name keeps the bytes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.train import InitSpec, TrainSpec
from bridge_engine.state.checkpoint import MANIFEST, sha256_of
from bridge_engine.state.initial_parameters import FOLDER, unfit
from service.artifacts import ArtifactsUnavailable, Damaged, Stored, artifact_store
from service.artifacts.cache import ArtifactCache
from service.errors import ApiError, invalid_fields
from service.settings import Settings
from service.store import Artifact, JobRow, NotFound, Store
from service.store.artifacts import publication

log = logging.getLogger(__name__)

BEFORE = -1
"""The step that a job's beginning counts as: no resume makes it void."""


def resolve(
    spec: TrainSpec, store: Store, settings: Settings, param: str = "init.step"
) -> tuple[TrainSpec, Path]:
    """The spec with the step's number in `init`, and where that checkpoint lies.

    Raises `ApiError` 422 if there is no such job or checkpoint, or if it does not fit; `param` is
    what was given the step by.
    """
    assert spec.init is not None
    try:
        source = store.get_job(spec.init.job)
    except NotFound as error:
        raise invalid_fields(
            [FieldError("init.job", "unknown_job", error.message, given=error.id)]
        ) from None
    if source.kind != "train":
        why = f"job {source.id} is an evaluation and has no parameters to start from"
        raise invalid_fields([FieldError("init.job", "not_a_training_job", why, given=source.id)])
    step, folder = _checkpoint(source, spec.init, store, settings, param)
    if errors := unfit(TrainSpec.model_validate(source.spec), spec):
        raise invalid_fields(errors)
    return spec.model_copy(update={"init": InitSpec(job=source.id, step=step)}), folder


def _checkpoint(
    source: JobRow, init: InitSpec, store: Store, settings: Settings, param: str
) -> tuple[int, Path]:
    saved = {row.step: row.path for row in store.checkpoints(source.id)}
    there = [step for step, path in saved.items() if _is_there(source.id, path, store, settings)]
    step = {"best": source.best_step, "latest": source.checkpoint_step}.get(str(init.step))
    if isinstance(init.step, int):
        step = init.step
    if step in there:
        folder = brought(source.id, saved[step], store, settings)
        if folder is not None:
            return step, folder
        there.remove(step)
    steps = ", ".join(map(str, there))
    instead = f"there are those of steps {steps}" if there else "it has none now"
    if step is None and init.step == "best":
        code, why = "no_best_checkpoint", f"no accuracy of job {source.id} was measured"
    elif step is None or step not in saved:
        code, why = "unknown_checkpoint", f"job {source.id} has no checkpoint {init.step!r}"
    else:
        code, why = "checkpoint_gone", f"the checkpoint of step {step} of {source.id} was deleted"
    raise invalid_fields(
        [
            FieldError(
                param, code, f"{why}; {instead}", given=init.step, allowed=[str(s) for s in there]
            )
        ]
    )


def put(folder: Path, run: Path, param: str = "init.step") -> None:
    """Puts the checkpoint (or another folder that was published whole) into the run directory of a
    job that is to start from it; `param` names it.

    Raises `ApiError` 422 (`checkpoint_gone`) if it is deleted at this moment, 507 on a full disk.
    """
    target = run / FOLDER
    target.mkdir(parents=True)
    try:
        for file in sorted(folder.iterdir()):
            _link(file, target / file.name)
        if not (target / MANIFEST).is_file():
            raise FileNotFoundError(folder)
    except FileNotFoundError:
        shutil.rmtree(run, ignore_errors=True)
        gone = "what the job should start from was deleted while it was copied; name another"
        raise invalid_fields([FieldError(param, "checkpoint_gone", gone)]) from None
    except OSError as error:
        shutil.rmtree(run, ignore_errors=True)
        raise ApiError(
            507, "disk_full", f"the checkpoint cannot be copied ({error.strerror}); free some space"
        ) from None


def inherit(spec: TrainSpec, source: str, run: Path, store: Store, settings: Settings) -> bool:
    """Puts there what the job `source` itself started from; False if that is not there.

    Raises `ApiError` 422 if it does not fit.
    """
    folder = brought(source, FOLDER, store, settings)
    try:
        state = json.loads((folder / "state.json").read_text()) if folder else None
    except (OSError, ValueError):
        return False
    if folder is None or state is None:
        return False
    if errors := unfit(TrainSpec.model_validate(state["spec"]), spec):
        raise invalid_fields(errors)
    put(folder, run)
    return True


def published(run: Path, job_id: str, store: Store, settings: Settings) -> list[Artifact]:
    """Publishes the copy in `run`, for workers elsewhere; nothing without an artifact store.

    Raises `ApiError` 503 where the store does not answer.
    """
    artifacts = artifact_store(settings.artifacts_url)
    folder = run / FOLDER
    if artifacts is None or not folder.is_dir():
        return []
    prefix = publication(job_id, FOLDER, 0, sha256_of(folder / MANIFEST))
    store.expect_remains(prefix)  # should this process die, or the job not be written
    with _reaching():
        stored = artifacts.put(folder, prefix)
    return [Artifact(FOLDER, BEFORE, stored.prefix, stored.sha256, stored.bytes)]


def take_back(run: Path, job_id: str, settings: Settings) -> None:
    """Removes the copy of a job that was not made after all."""
    folder = run / FOLDER
    artifacts = artifact_store(settings.artifacts_url)
    try:
        if artifacts is not None and folder.is_dir():
            artifacts.delete(publication(job_id, FOLDER, 0, sha256_of(folder / MANIFEST)))
    except (ArtifactsUnavailable, OSError) as error:
        log.warning("what job %s was to start from stays in the artifact store: %s", job_id, error)
    shutil.rmtree(run, ignore_errors=True)


def _is_there(job_id: str, path: str, store: Store, settings: Settings) -> bool:
    here = (settings.run_dir(job_id) / path / MANIFEST).is_file()
    return here or _stored(job_id, path, store, settings) is not None


def _stored(job_id: str, path: str, store: Store, settings: Settings) -> Stored | None:
    row = store.artifact(job_id, path) if settings.artifacts_url else None
    return None if row is None else Stored(row.prefix, row.sha256, row.bytes)


def brought(job_id: str, path: str, store: Store, settings: Settings) -> Path | None:
    """The folder of a run, here: in its directory, or fetched and verified; None if nobody has it
    whole."""
    here = settings.run_dir(job_id) / path
    if (here / MANIFEST).is_file():
        return here
    artifacts = artifact_store(settings.artifacts_url)
    stored = _stored(job_id, path, store, settings)
    if artifacts is None or stored is None:
        return None
    cache = ArtifactCache(settings.cache_dir, settings.artifacts_cache_bytes, artifacts)
    try:
        with _reaching():
            return cache.folder(stored)
    except Damaged as error:
        log.error("%s of job %s is damaged in the artifact store: %s", path, job_id, error.message)
        return None


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except ArtifactsUnavailable as error:
        raise ApiError(
            503,
            "artifacts_unavailable",
            f"the artifact store does not answer: {error.message}",
            headers={"Retry-After": "5"},
            outside="the artifact store does not answer now; try again",
        ) from error


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(file, target)
