"""What lives and does nothing, or works where it must not any more: each is found and ended.

Real worker processes and a scripted engine; see `tests/faults` for all of it at random.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from bridge_engine.events import EventWriter, Metric
from bridge_engine.process import lifeline
from bridge_engine.process.lifeline import Deadline
from bridge_engine.state.checkpoint import publish
from service.store import Store
from service.store.models import JobRow, OutboxRow
from tests.integration.test_worker import (
    REPOSITORY,
    SHORT,
    Start,
    assert_complete,
    at_step,
    ended,
    freeze,
    home,
    pid_of,
    start,
    store,
)
from tests.support.jobs import held, let_go, spec, submit, wait_until
from tests.support.waiting import gone, until
from worker.rundir import RUN_LOCK

__all__ = ["home", "start", "store"]  # fixtures of the worker's tests

# ------------------------------------------------------------------ the engine's deadline


class Alone:
    """A scripted engine that this test is the worker of."""

    def __init__(self, run: Path, **script: object) -> None:
        self.run = run
        run.mkdir()
        path = run / "spec.json"
        path.write_text(spec(steps=10_000, every=10_000, **script).model_dump_json())
        self.deadline = Deadline.create(time.monotonic() + 1000)
        read, self.pipe = os.pipe()
        arguments = ["run", str(path), "--dir", str(run), "--parent-pipe", str(read)]
        arguments += ["--deadline", str(self.deadline.descriptor)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.scripted_engine", *arguments],
            cwd=REPOSITORY,
            pass_fds=(read, self.deadline.descriptor),
            start_new_session=True,
        )
        os.close(read)
        self.events = run / "events.jsonl"
        until(lambda: self.events.exists() and self.events.read_text().count("metric") >= 3)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.pipe)
        self.deadline.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Alone]:
    engine = Alone(tmp_path / "run", child=True)
    yield engine
    engine.close()


def test_an_engine_ends_with_all_it_started_when_its_deadline_passes(alone: Alone) -> None:
    deadline = time.monotonic() + 1
    alone.deadline.set(deadline)
    assert alone.process.wait(120) != 0
    assert time.monotonic() >= deadline, "not before"
    assert gone(int((alone.run / "child.pid").read_text()))


def test_an_engine_that_wakes_after_its_deadline_writes_what_it_was_writing_at_most(
    alone: Alone,
) -> None:
    """It may have been stopped between its look at the clock and the write; it holds the lock of
    the run directory until it is gone, so that nobody else writes there meanwhile."""
    alone.process.send_signal(signal.SIGSTOP)
    os.waitpid(alone.process.pid, os.WUNTRACED)
    written = alone.events.read_bytes()
    alone.deadline.set(0)
    alone.process.send_signal(signal.SIGCONT)
    assert alone.process.wait(120) != 0
    after = alone.events.read_bytes()
    assert after.startswith(written)
    assert after.count(b"\n") - written.count(b"\n") <= 1


@pytest.fixture
def deadline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deadline]:
    """This process's own; it leaves by SystemExit."""
    deadline = Deadline.create(time.monotonic() + 1000)
    monkeypatch.setattr(lifeline, "_deadline", deadline)
    monkeypatch.setattr(lifeline, "_leave", lambda why: sys.exit(why))
    yield deadline
    monkeypatch.undo()  # nobody looks at it once it is closed
    deadline.close()


def test_no_event_begins_after_the_deadline(tmp_path: Path, deadline: Deadline) -> None:
    writer = EventWriter(tmp_path)
    writer.emit(Metric(step=1, metrics={"reward": 0.5}))
    written = [writer.path.read_bytes(), writer.metrics_path.read_bytes()]
    assert all(written)
    deadline.set(0)
    with pytest.raises(SystemExit):
        writer.emit(Metric(step=2, metrics={"reward": 0.5}))
    assert [writer.path.read_bytes(), writer.metrics_path.read_bytes()] == written


def test_no_checkpoint_is_published_after_the_deadline(tmp_path: Path, deadline: Deadline) -> None:
    def late(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        deadline.set(0)

    with pytest.raises(SystemExit):
        publish(tmp_path / "step-000001", late)
    assert not (tmp_path / "step-000001").exists()


def test_the_job_of_a_worker_that_stands_still_is_finished_by_another(
    store: Store, start: Start, home: Path
) -> None:
    """The first worker never wakes up; its engine knows by itself when it must go."""
    job_id = submit(store, steps=60, every=5, step_seconds=0.05, **held(40, home))
    first = start(**SHORT)
    wait_until(store, job_id, at_step(6))
    freeze(first, home)
    engine, attempt = pid_of(home, job_id), store.get_job(job_id).attempt
    start()
    assert gone(engine)
    let_go(home)
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", attempt + 1)
    assert_complete(store, job_id, 60)


# ------------------------------------------------------------------ orphans


def test_an_orphan_that_stands_still_is_ended_and_named(
    store: Store, start: Start, home: Path
) -> None:
    """It cannot hear that its worker is dead, and holds the run directory."""
    job_id = submit(store, steps=60, every=5, step_seconds=0.05, child=True, **held(40, home))
    first = start()
    wait_until(store, job_id, at_step(6))
    orphan, child = pid_of(home, job_id), pid_of(home, job_id, "child")
    os.killpg(orphan, signal.SIGSTOP)
    first.kill()
    first.wait()
    let_go(home)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert gone(orphan)
    assert gone(child)
    logs = [e.data["message"] for e in store.events_after(job_id, limit=1000) if e.type == "log"]
    assert any(f"pid {orphan} on " in message and "was ended" in message for message in logs)
    assert f"pid {orphan} on " in (home / "worker.log").read_text()
    assert_complete(store, job_id, 60)


# ------------------------------------------------------------------ clocks


def test_a_clock_that_was_set_back_hides_no_waiting_job(store: Store) -> None:
    """Its message was sent, it seems, tomorrow."""
    job_id, tomorrow = submit(store), datetime.now(UTC) + timedelta(days=1)
    (message,) = store.outbox_batch()
    with store.write() as session:
        session.execute(update(OutboxRow).values(sent_at=tomorrow))
        session.execute(update(JobRow).values(queued_at=tomorrow))
    assert store.overdue_job(60, "w:0") == job_id
    assert store.resend_unclaimed(30) == 1
    assert [again.id for again in store.outbox_batch()] == [message.id]


# ------------------------------------------------------------------ memory


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 200 MB."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"bridge-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if old else "memory.max"
        (group / limit).write_text(str(200 << 20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"cannot make a control group with a limit of memory: {error}")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())  # the worker has left it
    group.rmdir()


@pytest.fixture
def start_in_group(small_group: Path, start: Start) -> Callable[..., None]:
    def begin(**settings: object) -> None:
        worker = start(**settings)
        (small_group / "cgroup.procs").write_text(str(worker.pid))

    return begin


def test_an_engine_that_the_kernel_killed_for_memory_fails_its_job_with_what_to_lower(
    store: Store, start_in_group: Callable[..., None]
) -> None:
    start_in_group()
    time.sleep(1)  # the worker belongs to the group before its engine is started
    job_id = submit(store, steps=9, every=2, eat_at=5)
    job = wait_until(store, job_id, ended)
    assert job.error
    tries = [(a.outcome, a.error) for a in store.attempts(job_id)]
    assert (job.status, len(tries)) == ("failed", 1), tries
    assert (job.error["category"], job.error["code"]) == ("oom", "out_of_memory")
    assert job.error["param"] == "runtime.micro_batch"
    assert "runtime.micro_batch: lower it (now 64)" in job.error["message"]


def test_a_lost_rank_is_tried_again(store: Store, start: Start) -> None:
    job_id = submit(store, steps=10, every=4, lose_at=6)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    first, _ = store.attempts(job_id)
    assert first.error
    assert first.error["code"] == "rank_lost"
    assert_complete(store, job_id, 10)


# ------------------------------------------------------------------ leaving


def test_a_worker_leaves_within_the_grace_whatever_its_engine_does(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=10, ignore_term=True, hang_at=2, child=True)
    worker = start(GRACE_SECONDS=1)
    wait_until(store, job_id, at_step(2))
    worker.terminate()
    assert worker.wait(120) == 0
    job = store.get_job(job_id)
    assert (job.status, job.lost_attempts) == ("queued", 0)
    assert gone(pid_of(home, job_id))
    assert gone(pid_of(home, job_id, "child"))


def test_a_worker_that_waits_for_a_run_directory_leaves_when_it_is_told_to(
    store: Store, start: Start, home: Path
) -> None:
    import fcntl

    job_id = submit(store)
    (home / "runs" / job_id).mkdir(parents=True)
    with (home / "runs" / job_id / RUN_LOCK).open("w") as somebody:
        fcntl.flock(somebody, fcntl.LOCK_EX)
        worker = start(GRACE_SECONDS=600)
        wait_until(store, job_id, lambda job: job.status == "running")
        time.sleep(1)
        worker.terminate()
        assert worker.wait(120) == 0
    job = store.get_job(job_id)
    assert (job.status, job.lost_attempts) == ("queued", 0)
