"""One job, from claim to end: claim → start the engine → forward its events → finish.

Whoever calls, by message or by a look into the database, may call twice, late or in vain: the claim
decides. What is written about the job carries the claim's attempt, and the store refuses it once
the job is another attempt's; then the engine is killed and this worker leaves without a word.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bridge_engine.errors import EngineError
from bridge_engine.events import Done, Failed
from bridge_engine.process import failpoints
from service.settings import Settings
from service.store import Claim, JobRow, StaleAttempt, Store, StoreUnavailable, breakdown
from service.store.queues import NO_ROOM
from worker import gpus, log
from worker.forward import Ending, Forwarder
from worker.gpus import Gpus
from worker.lease import Lease
from worker.memory import OomWatch, out_of_memory
from worker.process import Engine, death
from worker.publish import publishing, tell
from worker.room import check_room
from worker.rundir import Leaving, RunDirectory, is_of_latest_retry, locked, note_start, prepare
from worker.stall import stalled

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
    failpoints.reached("after_claim")
    with Lease(store, claim, settings, since=since) as lease:
        try:
            report = _run(claim, lease, store, settings, stop)
            failpoints.reached("after_done_before_recorded")
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
    except Leaving:
        return release()
    except EngineError as error:
        return release(breakdown(error.category, error.code, error.message))
    except OSError as error:
        return release(_of_disk(error))
    except Exception as error:
        log.exception("worker failed", job=job_id, attempt=attempt)
        return release(breakdown("internal", "worker_error", f"{type(error).__name__}: {error}"))
    if isinstance(ending, Done):
        return finish("succeeded", result=ending.result)
    if isinstance(ending, Failed):
        return finish("failed", error=_as_error(ending))
    if died is not None and died["category"] == "oom":
        return finish("failed", error=died)  # the next attempt would only get there again
    return release(died)  # saved and left, or died: the next attempt goes on from the checkpoint


def _supervise(
    claim: Claim, lease: Lease, store: Store, settings: Settings, stop: threading.Event
) -> tuple[Ending | None, Fields | None]:
    """The run's last word, and what the engine died of if it had none."""
    run = settings.run_dir(claim.job.id)
    # An engine elsewhere that outlives its worker ends when the lease did that it ran under.
    patience = settings.lease_seconds + settings.grace_seconds
    with (
        locked(run, lease, stop, patience) as directory,
        publishing(store, claim, run, settings, lease) as publisher,
    ):
        check_room(run, claim.job)
        notes = publisher.fetch() if publisher else []
        spec = prepare(run, claim.job, store)
        tell(run, notes)
        forward = Forwarder(store, claim, run, publisher)
        heard = forward.ending
        _drain(forward, lease, claim)  # what an earlier attempt said last and nobody heard
        fresh = _is_final(forward.ending) and forward.ending is not heard
        if fresh and not is_of_latest_retry(run, claim.job):
            forward.ending = None  # of before its owner had it tried again
        if isinstance(forward.ending, Done) or _is_final(forward.ending):
            return forward.ending, None
        forward.ending = None
        directory.tell()
        note_start(run, claim.job)
        return _watch(claim, lease, settings, stop, directory, spec, forward)


def _watch(
    claim: Claim,
    lease: Lease,
    settings: Settings,
    stop: threading.Event,
    directory: RunDirectory,
    spec: Path,
    forward: Forwarder,
) -> tuple[Ending | None, Fields | None]:
    """Starts the engine and stays with it until it has ended."""
    run, job = directory.path, claim.job
    environment = {"BRIDGE_UPLOADS_DIR": str(settings.uploads_dir), **gpus.environment(claim)}
    patience = job.spec.get("runtime", {}).get("stall_seconds") or settings.stall_seconds
    memory = OomWatch()
    with Engine.start(
        gpus.command(claim, settings.engine_command),
        spec,
        run,
        lock=directory.lock,
        deadline=lease.deadline,
        environment=environment,
    ) as engine:
        directory.hand_over(engine.pid)
        log.info("engine started", job=job.id, attempt=claim.attempt, pid=engine.pid)
        forward.heard_now()
        stall: Fields | None = None
        while (status := engine.wait(settings.poll_seconds)) is None:
            memory.look()
            if lease.lost:
                engine.kill()
                raise StaleAttempt(job.id, claim.attempt)
            if lease.stop_wanted or stop.is_set():
                engine.stop(settings.grace_seconds)
            if forward.ending is not None:
                engine.expect_exit(settings.grace_seconds)
            forward.pump()
            if forward.silence() > patience and not stall and not engine.is_leaving:
                stall = stalled(forward, engine.word, run)
                log.warning("engine stalled", job=job.id, because=stall["message"])
                engine.kill()
        _drain(forward, lease, claim)
        if _is_final(forward.ending):
            return forward.ending, None
    ending = forward.ending
    # Ranks die under a launcher that leaves with a status of its own.
    killed = status == -signal.SIGKILL if ending is None else _lost_a_rank(ending)
    if stall is None and killed and not engine.asked_to_stop and memory.rose():
        return None, out_of_memory(job.spec)
    if isinstance(ending, Failed):
        return None, _as_error(ending)
    if ending is not None or (engine.asked_to_stop and stall is None):
        return ending, None
    return None, stall or death(status, run / "engine.log", memory_counted=not memory.blind)


def _lost_a_rank(ending: Ending) -> bool:
    return isinstance(ending, Failed) and ending.code == "rank_lost"


def _is_final(ending: Ending | None) -> bool:
    """Did the run fail so that trying again would only fail again?"""
    return isinstance(ending, Failed) and not (ending.category == "infra" and ending.retryable)


def _as_error(failed: Failed) -> Fields:
    named = ("category", "code", "message", "param", "retryable")
    return {name: getattr(failed, name) for name in named}


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


def _of_disk(error: OSError) -> Fields:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = f"No space is left on the disk of {error.filename}; free some and run the job again."
        return breakdown("infra", NO_ROOM, full)
    return breakdown("infra", "engine_not_started", f"Could not run the engine: {error}")
