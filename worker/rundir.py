"""The run directory of a job, made ready for the next attempt."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.events import EventWriter, Log, parse
from bridge_engine.process.identity import ProcessIdentity
from service.store import JobRow, Store
from worker import log
from worker.family import end_family, end_group, word_of
from worker.lease import Lease

RUN_LOCK = ".lock"
"""Held by a worker until its engine runs, and then by the engine."""
ENGINE_LOCK = "engine.lock"
"""Held by the engine itself; under torchrun by rank 0, which does not have the other one."""


STARTED = "started.json"
"""Of which of the job's retries the engine is that ran here last."""


class Leaving(Exception):
    """There is no time to wait for the run directory."""


class RunDirectory:
    """A run directory that is ours: nobody else writes to it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.lock = descriptor
        """To be passed on to the engine."""
        self._closed = False
        self.ended: list[str] = []
        """Engines of earlier attempts that were found in it and ended."""

    def hand_over(self, pid: int) -> None:
        """The lock is the engine's alone from now on; who it is, is written into it.

        A worker that kept it too would, standing still, keep the next attempt out for ever, long
        after its engine has gone.
        """
        if (identity := ProcessIdentity.of(pid)) is not None:
            content = json.dumps(identity.as_dict()).encode() + b"\n"
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, content, 0)
        self.close()

    def close(self) -> None:
        """Gives up our hold on the lock."""
        if not self._closed:
            self._closed = True
            os.close(self.lock)

    def tell(self) -> None:
        """Puts the engines that were ended into the run's log."""
        for who in self.ended:
            message = f"the engine of an earlier attempt still ran here ({who}) and was ended"
            EventWriter(self.path).emit(Log(level="warning", message=message))
        self.ended.clear()


@contextmanager
def locked(
    run: Path, lease: Lease, stop: threading.Event, seconds: float
) -> Iterator[RunDirectory]:
    """Holds the run directory's lock.

    It is passed on to the engine, and one that outlives its worker keeps the next attempt out until
    it is gone, so two engines never write to one directory. Such an engine is ended if it is on
    this machine and certainly the one that the lock names; elsewhere its own deadline ends it.
    Waits for at most `seconds`, then raises EngineError (`run_in_use`); raises Leaving if this
    worker or the job is to stop meanwhile.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    directory = RunDirectory(run, descriptor)
    try:
        _wait_for(directory, lease, stop, time.monotonic() + seconds)
        yield directory
    finally:
        directory.close()


def _wait_for(directory: RunDirectory, lease: Lease, stop: threading.Event, until: float) -> None:
    run = directory.path
    holders: set[ProcessIdentity] = set()
    while not lease.lost:
        if _take(directory.lock) and _is_free(run / ENGINE_LOCK):
            return
        holders = {who for name in (RUN_LOCK, ENGINE_LOCK) if (who := _holder(run / name))}
        for who in holders:
            # The job is this attempt's, so whoever else works on it has lost it.
            if who.is_running and not lease.lost:
                _end(who)
                directory.ended.append(str(who))
                log.warning("an earlier attempt's engine still ran, ended it", run=run, engine=who)
        if stop.is_set() or lease.stop_wanted:
            raise Leaving
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    named = ", ".join(sorted(map(str, holders)))
    raise EngineError(
        f"an engine of an earlier attempt still works in {run} and did not leave"
        + (f"; the last one known there is {named}" if named else "")
        + f"; look for it with `fuser {run / RUN_LOCK}` and end it",
        code="run_in_use",
        category="infra",
        retryable=True,
    )


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Does nobody hold this lock? It is for the engine to take, not for us."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return _take(descriptor)
    finally:
        os.close(descriptor)


def _holder(path: Path) -> ProcessIdentity | None:
    """Who wrote down that it holds the lock; it may long be gone."""
    try:
        return ProcessIdentity.parse(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _end(who: ProcessIdentity) -> None:
    word = word_of(who.pid)
    end_group(who.pid)
    if word is not None:
        end_family(word)  # ranks and helpers in sessions of their own


def prepare(run: Path, job: JobRow, store: Store) -> Path:
    """Writes the spec, and brings the events up to what the database knows; the spec's path."""
    spec = run / "spec.json"
    temporary = run / "spec.json.tmp"
    temporary.write_text(json.dumps(job.spec, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, spec)
    _restore_events(run / "events.jsonl", job.id, store)
    return spec


def note_start(run: Path, job: JobRow) -> None:
    """From now on, what the run's events say is said by an engine of this attempt."""
    temporary = run / f"{STARTED}.tmp"
    temporary.write_text(json.dumps({"retries": job.retries}) + "\n")
    os.replace(temporary, run / STARTED)


def is_of_latest_retry(run: Path, job: JobRow) -> bool:
    """Was the engine that ran here last started after the job's owner last had it tried again?"""
    if job.retries == 0:
        return True
    try:
        return bool(json.loads((run / STARTED).read_text())["retries"] == job.retries)
    except (OSError, ValueError, KeyError):
        return False


def _restore_events(path: Path, job_id: str, store: Store) -> None:
    """Appends the events that the database has and the file has not.

    So it is after a machine's crash, or when the directory is gone altogether. The numbers of new
    events must go on from the last one ever forwarded, or they would be taken for old ones.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    last = parse(whole.rstrip(b"\n").rpartition(b"\n")[2]).seq if whole else 0
    missing = store.events_after(job_id, last, limit=1000)
    if not missing:
        return
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(len(whole))  # a torn last line
        file.seek(0, os.SEEK_END)
        while missing:
            lines = (json.dumps(event.data, ensure_ascii=False) + "\n" for event in missing)
            file.write("".join(lines).encode())
            missing = store.events_after(job_id, missing[-1].seq, limit=1000)
