"""One job, from claim to end: claim → start the engine → forward its events → finish.

Whoever calls, by message or by a look into the database, may call twice, late or in vain: the claim
decides. What is written about the job carries the claim's attempt, and the store refuses it once
the job is another attempt's; then the engine is killed and this worker leaves without a word.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from bridge_engine.errors import EngineError
from bridge_engine.events import Done, Failed
from service.settings import Settings
from service.store import Claim, JobRow, StaleAttempt, Store, StoreUnavailable, breakdown
from worker import gpus, log
from worker.forward import Ending, Forwarder
from worker.gpus import Gpus
from worker.lease import Lease
from worker.process import Engine, death
from worker.publish import publishing, tell
from worker.room import check_room
from worker.rundir import locked, prepare

Fields = dict[str, Any]
PAUSE = 0.5
"""Seconds between tries at a database that is out of reach."""


def execute_job(
    job_id: str,
    *,
    store: Store,
    settings: Settings,
    worker_id: str,
    stop: threading.Event,
    holds: Gpus | None = None,
) -> str | None:
    """Runs the job if it waits and may run; its status afterwards, None if there was nothing to do.
    `holds`: the worker's GPUs.

    Setting `stop` lets the engine save and hands the job back. Raises StoreUnavailable only if the
    job could not be claimed.
    """
    since = time.monotonic()
    holds = holds or Gpus(())
    claim = holds.claim(partial(store.claim, job_id, worker_id, settings.lease_seconds))
    if claim is None:
        log.info("not queued, or not to be run here and now: message dropped", job=job_id)
        return None
    try:
        return run_claim(claim, since=since, store=store, settings=settings, stop=stop)
    finally:
        holds.give_back(claim)


def run_claim(
    claim: Claim, *, since: float, store: Store, settings: Settings, stop: threading.Event
) -> str:
    """Runs a claimed job; its status afterwards, or `stale`. `since`: see `Lease`."""
    job_id, attempt = claim.job.id, claim.attempt
    log.info("claimed", job=job_id, attempt=attempt, method=claim.job.method)
    with Lease(store, claim, settings, since=since) as lease:
        try:
            report = _run(claim, lease, store, settings, stop)
            status = _write(report, lease, claim).status
        except StaleAttempt:
            log.warning("lost to another attempt", job=job_id, attempt=attempt)
            return "stale"
    log.info("left", job=job_id, attempt=attempt, status=status)
    return status


Report = Callable[[], JobRow]
"""What is to be written about the end of an attempt; a call to the store, ready to be made."""


def _run(
    claim: Claim, lease: Lease, store: Store, settings: Settings, stop: threading.Event
) -> Report:
    """Runs the engine to its end, and says how the attempt ended."""
    job_id, attempt = claim.job.id, claim.attempt

    def finish(status: Literal["succeeded", "failed"], **what: Fields) -> Report:
        return lambda: store.finish(job_id, attempt, status, **what)

    def release(error: Fields | None = None) -> Report:
        return lambda: store.release(job_id, attempt, error)

    try:
        ending, died = _supervise(claim, lease, store, settings, stop)
    except (StaleAttempt, StoreUnavailable) as error:
        if lease.lost or isinstance(error, StaleAttempt):
            raise StaleAttempt(job_id, attempt) from error
        return release(breakdown("infra", "database_unavailable", str(error)))
    except EngineError as error:
        if error.code == "disk_full":
            return finish("failed", error=breakdown("infra", error.code, error.message))
        return release(breakdown(error.category, error.code, error.message))
    except OSError as error:
        return _of_disk(error, finish, release)
    except Exception as error:
        log.exception("worker failed", job=job_id, attempt=attempt)
        return release(breakdown("internal", "worker_error", f"{type(error).__name__}: {error}"))
    if isinstance(ending, Done):
        return finish("succeeded", result=ending.result)
    if isinstance(ending, Failed):
        # Also where `retryable` says that the same job may succeed later, as with a full disk: only
        # a person can make room, and five more tries within a minute would bury the reason.
        named = ("category", "code", "message", "param", "retryable")
        return finish("failed", error={name: getattr(ending, name) for name in named})
    return release(died)  # saved and left, or died: the next attempt goes on from the checkpoint


def _supervise(
    claim: Claim, lease: Lease, store: Store, settings: Settings, stop: threading.Event
) -> tuple[Ending | None, Fields | None]:
    """The run's last word, and what the engine died of if it had none."""
    run = settings.run_dir(claim.job.id)
    with (
        locked(run, lease, settings.grace_seconds) as lock,
        publishing(store, claim, run, settings, lease) as publisher,
    ):
        check_room(run, claim.job)
        notes = publisher.fetch() if publisher else []
        spec = prepare(run, claim.job, store)
        tell(run, notes)
        forward = Forwarder(store, claim, run, publisher)
        _drain(forward, lease, claim)  # what an earlier attempt said last and nobody heard
        if isinstance(forward.ending, Done | Failed):
            return forward.ending, None
        forward.ending = None
        environment = {"BRIDGE_UPLOADS_DIR": str(settings.uploads_dir), **gpus.environment(claim)}
        command = gpus.command(claim, settings.engine_command)
        with Engine.start(command, spec, run, lock=lock, environment=environment) as engine:
            log.info("engine started", job=claim.job.id, attempt=claim.attempt, pid=engine.pid)
            while (status := engine.wait(settings.poll_seconds)) is None:
                if lease.lost:
                    engine.kill()
                    raise StaleAttempt(claim.job.id, claim.attempt)
                if lease.stop_wanted or stop.is_set():
                    engine.stop(settings.grace_seconds)
                if forward.ending is not None:
                    engine.expect_exit(settings.grace_seconds)
                forward.pump()
            _drain(forward, lease, claim)
        if forward.ending is not None or engine.asked_to_stop:
            return forward.ending, None
        return None, death(status, run / "engine.log")


def _drain(forward: Forwarder, lease: Lease, claim: Claim) -> None:
    """Forwards all there is; waits for the database, and for the artifact store, as long
    as the lease lasts."""
    while forward.pump():
        if lease.lost:
            raise StaleAttempt(claim.job.id, claim.attempt)
        if forward.out_of_reach:
            time.sleep(PAUSE)
        elif forward.publishing:
            time.sleep(PAUSE / 10)


def _write(report: Report, lease: Lease, claim: Claim) -> JobRow:
    """Makes the report; waits for the database as long as the lease lasts."""
    while not lease.lost:
        try:
            return report()
        except StoreUnavailable as error:
            log.warning("report waits", job=claim.job.id, because=error)
            time.sleep(PAUSE)
    raise StaleAttempt(claim.job.id, claim.attempt)


def _of_disk(
    error: OSError, finish: Callable[..., Report], release: Callable[..., Report]
) -> Report:
    """A full disk stays full: trying again at once would only hide it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = f"No space is left on the disk of {error.filename}; free some and run the job again."
        return finish("failed", error=breakdown("infra", "disk_full", full))
    return release(breakdown("infra", "engine_not_started", f"Could not run the engine: {error}"))
