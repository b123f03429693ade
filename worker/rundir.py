"""The run directory of a job, made ready for the next attempt."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.events import parse
from service.store import JobRow, Store
from worker.lease import Lease

RUN_LOCK = ".lock"


@contextmanager
def locked(run: Path, lease: Lease, seconds: float) -> Iterator[int]:
    """Holds the run directory's lock, and gives its file descriptor to be passed to the engine.

    The lock lives as long as anybody holds the descriptor: an engine that outlives its worker keeps
    the next attempt out until it is gone, so two engines never write to one directory. Waits for at
    most `seconds`, then raises EngineError (`run_in_use`).
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for(descriptor, run, lease, time.monotonic() + seconds)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, run: Path, lease: Lease, until: float) -> None:
    while not lease.lost:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.05)
    raise EngineError(
        f"an engine of an earlier attempt still works in {run} and did not leave; look for it with "
        f"`fuser {run / RUN_LOCK}` and end it",
        code="run_in_use",
        category="infra",
        retryable=True,
    )


def prepare(run: Path, job: JobRow, store: Store) -> Path:
    """Writes the spec, and brings the events up to what the database knows; the spec's path."""
    spec = run / "spec.json"
    temporary = run / "spec.json.tmp"
    temporary.write_text(json.dumps(job.spec, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, spec)
    _restore_events(run / "events.jsonl", job.id, store)
    return spec


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
