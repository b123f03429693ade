"""One job's execution, in this process, with a database that is not always there."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge_engine import events as ev
from service.settings import Settings
from service.store import Store
from tests.support.jobs import LONG, held, let_go, metric, numbered, submit, wait_until
from tests.support.scripted_engine import reward
from tests.support.waiting import until
from worker.execute import execute_job
from worker.lease import Lease
from worker.rundir import RUN_LOCK, locked, note_start


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite: Path) -> Settings:
    """Of a worker whose lease ends in those tests alone that are about it."""
    shutil.copyfile(migrated_sqlite, tmp_path / "bridge.db")
    return Settings(
        home=tmp_path,
        engine_command=[sys.executable, "-m", "tests.support.scripted_engine"],
        lease_seconds=LONG,
        heartbeat_seconds=0.2,
        grace_seconds=LONG,
        poll_seconds=0.05,
        retry_seconds=0.001,
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store.from_settings(settings)
    yield store
    store.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that soon says that the database is held; asked for before it."""
    monkeypatch.setattr("service.store.database.BUSY_SECONDS", 0.1)


def execute(job_id: str, store: Store, settings: Settings) -> str | None:
    return execute_job(
        job_id, store=store, settings=settings, worker_id="w", stop=threading.Event()
    )


def in_thread(job_id: str, store: Store, settings: Settings) -> tuple[threading.Thread, list[str]]:
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(str(execute(job_id, store, settings))))
    thread.start()
    return thread, answer


@contextmanager
def write_lock(settings: Settings) -> Iterator[None]:
    """Another program keeps the database's write lock."""
    with closing(sqlite3.connect(settings.home / "bridge.db", timeout=120)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.usefixtures("impatient")
def test_a_short_outage_of_the_database_loses_nothing(store: Store, settings: Settings) -> None:
    job_id = submit(store, steps=30, every=10, step_seconds=0.05, **held(20, settings.home))
    thread, answer = in_thread(job_id, store, settings)
    wait_until(store, job_id, lambda job: job.progress_step >= 5)
    with write_lock(settings):
        let_go(settings.home)
        time.sleep(0.7)
    thread.join()
    assert answer == ["succeeded"]
    assert store.get_job(job_id).attempt == 1
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 31)]


def test_a_disk_without_room_for_a_checkpoint_ends_the_attempt_before_it_starts(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        job_id = submit(store)
        there = settings.model_copy(update={"home": disk})
        assert execute(job_id, store, there) == "queued"
        (attempt,) = store.attempts(job_id)
        error = attempt.error
        assert error is not None
        assert (error["code"], error["retryable"]) == ("disk_full", True)
        assert re.search(
            r"has 8 MiB free, and one checkpoint of this job needs \d+ MiB", error["message"]
        )
        assert not (disk / "runs" / job_id / "events.jsonl").exists(), "no engine was started"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.usefixtures("impatient")
def test_an_outage_longer_than_the_lease_ends_the_attempt(store: Store, settings: Settings) -> None:
    """Another worker may own the job by now, so this one's engine must not touch it any more."""
    settings = settings.model_copy(update={"lease_seconds": 4})
    job_id = submit(store, steps=100_000, every=100_000)
    thread, answer = in_thread(job_id, store, settings)
    # or the machine stood still for as long already
    wait_until(store, job_id, lambda job: job.progress_step >= 3 or not thread.is_alive())
    with write_lock(settings):
        thread.join(120)
    assert answer == ["stale"]
    assert until(store.requeue_expired) == [job_id]


def test_an_engine_that_cannot_end_by_itself_is_killed_once_its_job_is_anothers(
    store: Store, settings: Settings
) -> None:
    """One that stands still sees no deadline."""
    job_id = submit(store, steps=100_000, every=100_000, step_seconds=0.05)
    thread, answer = in_thread(job_id, store, settings)
    wait_until(store, job_id, lambda job: job.progress_step >= 2)
    engine = psutil.Process(int((settings.run_dir(job_id) / "engine.pid").read_text()))
    engine.suspend()
    store.release(job_id, 1)
    thread.join(120)
    assert answer == ["stale"]
    assert not engine.is_running()


def test_a_renewal_counts_from_when_it_was_asked_for_and_not_from_when_it_was_answered(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer may be on its way for longer than the lease lasts that it tells of."""
    settings = settings.model_copy(update={"lease_seconds": 0.5})
    asked, heartbeat = [], Store.heartbeat

    def slow(*given: Any) -> str:
        asked.append(time.monotonic())
        answer = heartbeat(*given)
        time.sleep(2 * settings.lease_seconds)
        return answer

    monkeypatch.setattr(Store, "heartbeat", slow)
    claim = store.claim(submit(store), "w:0", settings.lease_seconds)
    assert claim
    with Lease(store, claim, settings, since=time.monotonic()) as lease:
        while len(asked) < 2:
            time.sleep(0.01)
        assert lease.lost


def test_a_worker_hears_that_its_job_is_anothers_long_before_its_lease_ends(
    store: Store, settings: Settings
) -> None:
    job_id = submit(store)
    claim = store.claim(job_id, "w:0", settings.lease_seconds)
    assert claim
    with Lease(store, claim, settings, since=time.monotonic()) as lease:
        assert not lease.lost
        store.release(job_id, claim.attempt)
        assert store.claim(job_id, "other:0", settings.lease_seconds)
        until(lambda: lease.lost, LONG / 2)


def test_a_run_that_had_ended_is_not_run_again(store: Store, settings: Settings) -> None:
    """Its worker was lost after it forwarded the last event, before it could finish the job."""
    job_id = submit(store)
    assert store.claim(job_id, "lost", 60)
    store.append_events(job_id, 1, numbered(metric(1), ev.Done(step=1, result={"a": 1})))
    store.release(job_id, 1)
    assert execute(job_id, store, settings) == "succeeded"
    assert store.get_job(job_id).result == {"a": 1}
    assert not (settings.run_dir(job_id) / "engine.log").exists(), "no engine was started"


def test_what_an_attempt_said_last_is_heard_by_the_next(store: Store, settings: Settings) -> None:
    job_id = submit(store)
    run = settings.run_dir(job_id)
    run.mkdir(parents=True)
    writer = ev.EventWriter(run)
    writer.emit(metric(1))
    writer.emit(ev.Failed(step=1, category="user", code="not_finite", message="no number"))
    assert execute(job_id, store, settings) == "failed"
    error = store.get_job(job_id).error
    assert error
    assert error["code"] == "not_finite"


def given_up(store: Store, settings: Settings) -> Path:
    """The run directory of a job that was retried after it had been given up: its engine's last
    word is in it, and nobody has heard it."""
    store.max_attempts = 1
    job_id = submit(store)
    claim = store.claim(job_id, "lost", 60)
    assert claim
    run = settings.run_dir(job_id)
    run.mkdir(parents=True)
    note_start(run, claim.job)
    writer = ev.EventWriter(run)
    writer.emit(metric(1))
    writer.emit(ev.Failed(step=1, category="user", code="not_finite", message="no number"))
    lost = {"category": "infra", "code": "worker_lost", "message": "lost."}
    assert store.release(job_id, 1, lost).status == "failed"
    store.request(job_id, "retry")
    return run


def test_a_retry_does_not_end_as_the_attempt_before_it_did_unheard(
    store: Store, settings: Settings
) -> None:
    job_id = given_up(store, settings).name
    assert execute(job_id, store, settings) == "succeeded"
    seqs = [event.seq for event in store.events_after(job_id)]
    assert seqs == list(range(1, len(seqs) + 1)), "what it had said is kept all the same"


def test_what_the_retry_itself_said_last_is_heard(store: Store, settings: Settings) -> None:
    run = given_up(store, settings)
    note_start(run, store.get_job(run.name))
    ev.EventWriter(run).emit(ev.Failed(step=1, category="user", code="bad_data", message="no good"))
    assert execute(run.name, store, settings) == "failed"
    error = store.get_job(run.name).error
    assert error
    assert error["code"] == "bad_data"


def test_two_engines_never_share_a_run_directory(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def soon(run: Path, lease: Lease, stop: threading.Event, _: float) -> Any:
        return locked(run, lease, stop, 0.5)

    monkeypatch.setattr("worker.execute.locked", soon)
    job_id = submit(store)
    run = settings.run_dir(job_id)
    run.mkdir(parents=True)
    with (run / RUN_LOCK).open("w") as somebody:
        fcntl.flock(somebody, fcntl.LOCK_EX)
        assert execute(job_id, store, settings) == "queued"
    (attempt,) = store.attempts(job_id)
    assert attempt.error
    assert attempt.error["code"] == "run_in_use"
    assert execute(job_id, store, settings) == "succeeded"


def test_a_full_disk_is_told(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/runs")

    monkeypatch.setattr("worker.execute.prepare", full)
    job_id = submit(store)
    assert execute(job_id, store, settings) == "queued"
    (attempt,) = store.attempts(job_id)
    assert attempt.error
    assert (attempt.error["category"], attempt.error["code"]) == ("infra", "disk_full")


def test_a_full_disk_that_the_engine_tells_of_is_another_workers_chance_and_ends_the_job_at_last(
    store: Store, settings: Settings
) -> None:
    store.max_attempts = 2
    job_id = submit(store, full_at=2)  # before there is a checkpoint
    for status in ("queued", "failed"):
        assert execute(job_id, store, settings) == status
    job = store.get_job(job_id)
    assert job.error
    assert (job.attempt, job.error["code"], job.error["retryable"]) == (2, "disk_full", True)
    assert job.error["message"].startswith("full. Given up: it broke down 2 times")


def test_an_event_that_makes_no_sense_is_told(store: Store, settings: Settings) -> None:
    job_id = submit(store)
    run = settings.run_dir(job_id)
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text('{"type": "nonsense"}\n')
    assert execute(job_id, store, settings) == "queued"
    (attempt,) = store.attempts(job_id)
    assert attempt.error
    assert attempt.error["code"] == "worker_error"


def test_a_message_for_an_ended_job_does_nothing(store: Store, settings: Settings) -> None:
    job_id = submit(store)
    store.request_cancel(job_id)
    assert execute(job_id, store, settings) is None
    assert not settings.run_dir(job_id).exists()
