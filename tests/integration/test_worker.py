"""Real worker processes and a scripted engine over SQLite: what survives whom."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.store import JobRow, Store
from tests.support.jobs import LONG, held, let_go, submit, wait_until
from tests.support.scripted_engine import reward
from tests.support.waiting import gone, until

REPOSITORY = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[bytes]]
SHORT = {"LEASE_SECONDS": 6}
"""A lease whose end a test can wait for, and that a worker keeps while the machine is busy."""


@pytest.fixture
def home(tmp_path: Path, migrated_sqlite: Path) -> Path:
    shutil.copyfile(migrated_sqlite, tmp_path / "bridge.db")
    return tmp_path


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{home / 'bridge.db'}")
    yield store
    store.close()


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts `python -m worker` with short times, but for those whose end changes what happens: the
    lease and the grace end only where a test is about it. Ends what is left of the workers after
    the test."""
    workers: list[subprocess.Popen[bytes]] = []

    def start(**settings: object) -> subprocess.Popen[bytes]:
        given = {
            "HOME": home,
            "ENGINE_COMMAND": f"{sys.executable} -m tests.support.scripted_engine",
            "LEASE_SECONDS": LONG,
            "HEARTBEAT_SECONDS": 0.2,
            "GRACE_SECONDS": LONG,
            "RECONCILE_SECONDS": 0.2,
            "RETRY_SECONDS": 0.1,
            "POLL_SECONDS": 0.05,
            **settings,
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
        environment = clean | {f"BRIDGE_{name}": str(value) for name, value in given.items()}
        with (home / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "worker"],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
            )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
            worker.send_signal(signal.SIGCONT)
    for worker in workers:
        try:
            worker.wait(120)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def at_step(step: int) -> Callable[[JobRow], bool]:
    return lambda job: job.progress_step >= step


def ended(job: JobRow) -> bool:
    return job.ended


def pid_of(home: Path, job_id: str, name: str = "engine") -> int:
    return int((home / "runs" / job_id / f"{name}.pid").read_text())


def assert_complete(store: Store, job_id: str, steps: int) -> None:
    """Every figure and every sample of every step is there, once, as if nothing had happened."""
    assert store.metrics(job_id) == {
        "reward": [(step, reward(step)) for step in range(1, steps + 1)],
        "tokens": [(step, float(step)) for step in range(1, steps + 1)],
    }
    samples = [(s.step, s.completion) for s in store.samples(job_id, limit=10_000)]
    assert samples == [(step, str(step)) for step in range(steps, 0, -1)]
    seqs = [event.seq for event in store.events_after(job_id, limit=10_000)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_job_runs_to_its_end(store: Store, start: Start, home: Path) -> None:
    job_id = submit(store, steps=10, every=4)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt, job.progress_step) == ("succeeded", 1, 10)
    assert job.result == {"best_step": 10, "accuracy_after": 0.5}
    assert [c.step for c in store.checkpoints(job_id)] == [4, 8, 10]
    assert_complete(store, job_id, 10)
    assert store.events_after(job_id, limit=1000)[-1].type == "done"
    assert (home / "runs" / job_id / "engine.log").exists()
    assert f"claimed job={job_id} attempt=1 method=bridge" in (home / "worker.log").read_text()


def test_a_killed_worker_costs_nothing_but_time(store: Store, start: Start, home: Path) -> None:
    job_id = submit(store, steps=40, every=5, step_seconds=0.05, child=True, **held(30, home))
    first = start()
    wait_until(store, job_id, at_step(12))
    engine = pid_of(home, job_id)
    first.kill()
    assert gone(engine), "the engine notices and stops"
    assert gone(pid_of(home, job_id, "child")), "and takes along what it has started"
    assert store.get_job(job_id).status == "running", "the lease has not run out yet"
    let_go(home)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert [a.outcome for a in store.attempts(job_id)] == ["lost", "succeeded"]
    resumed = [e.step for e in store.events_after(job_id, limit=1000) if e.type == "resume"]
    assert resumed[0] is not None
    assert resumed[0] >= 10, "from the newest checkpoint, not from the start"
    assert_complete(store, job_id, 40)


def test_a_new_worker_takes_over_from_a_dead_one_before_its_lease_runs_out(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=40, every=5, step_seconds=0.05, **held(30, home))
    long = {"LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 200}
    first = start(**long)
    wait_until(store, job_id, at_step(12))
    first.kill()
    first.wait()
    let_go(home)
    start(**long)
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    lost, _ = store.attempts(job_id)
    assert lost.error
    assert (lost.outcome, lost.error["code"]) == ("lost", "worker_lost")
    assert_complete(store, job_id, 40)
    assert len(list((home / "workers").iterdir())) == 1, "the dead worker's file is gone"


def test_a_new_worker_leaves_the_jobs_of_a_living_one_alone(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=10_000, every=10_000, step_seconds=0.05)
    start(LEASE_SECONDS=600, HEARTBEAT_SECONDS=200)
    wait_until(store, job_id, at_step(3))
    start()
    until(lambda: (home / "worker.log").read_text().count("started what=local") == 2)
    time.sleep(1)  # several looks of the reconciler's
    job = store.get_job(job_id)
    assert (job.status, job.attempt) == ("running", 1)
    assert len(store.attempts(job_id)) == 1


def test_cancel_is_heard_long_before_the_next_heartbeat(store: Store, start: Start) -> None:
    job_id = submit(store, steps=10_000, every=10_000)
    start(LEASE_SECONDS=600, HEARTBEAT_SECONDS=200)
    lease = wait_until(store, job_id, at_step(3)).lease_expires_at
    time.sleep(1.5)
    assert store.get_job(job_id).lease_expires_at == lease, "a look writes nothing"
    store.request_cancel(job_id)
    asked = time.monotonic()
    assert wait_until(store, job_id, ended).status == "cancelled"
    assert time.monotonic() - asked < 120


def test_cancel_lets_the_engine_save(store: Store, start: Start) -> None:
    job_id = submit(store, steps=10_000, every=10_000)
    start()
    wait_until(store, job_id, at_step(3))
    assert store.request_cancel(job_id).status == "cancelling"
    job = wait_until(store, job_id, ended)
    assert (job.status, job.error) == ("cancelled", None)
    assert store.events_after(job_id, limit=10_000)[-1].type == "stopped"
    (saved,) = store.checkpoints(job_id)
    assert saved.step == job.progress_step
    assert [a.outcome for a in store.attempts(job_id)] == ["cancelled"]


def test_cancel_of_a_deaf_engine_kills_it_and_its_children(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=10, ignore_term=True, hang_at=2, child=True)
    start(GRACE_SECONDS=0.5)
    wait_until(store, job_id, at_step(2))
    store.request_cancel(job_id)
    assert wait_until(store, job_id, ended).status == "cancelled"
    assert gone(pid_of(home, job_id))
    assert gone(pid_of(home, job_id, "child"))


def test_a_killed_engine_goes_on_from_its_checkpoint(store: Store, start: Start) -> None:
    job_id = submit(store, steps=20, every=4, kill_at=10)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    first, _ = store.attempts(job_id)
    assert first.error
    assert (first.error["category"], first.error["code"]) == ("infra", "engine_killed")
    assert_complete(store, job_id, 20)


def test_an_engine_killed_before_its_first_checkpoint_starts_over(
    store: Store, start: Start
) -> None:
    job_id = submit(store, steps=6, every=5, kill_at=3)
    start()
    assert wait_until(store, job_id, ended).status == "succeeded"
    assert_complete(store, job_id, 6)


def test_an_engine_that_is_always_killed_is_given_up(store: Store, start: Start) -> None:
    job_id = submit(store, steps=20, every=4, kill_always=6)
    start(MAX_ATTEMPTS=2)
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("failed", 2)
    assert job.error
    assert (job.error["category"], job.error["code"]) == ("infra", "engine_killed")
    assert "broke down 2 times" in job.error["message"]


def test_an_engine_that_leaves_without_a_word_is_quoted(store: Store, start: Start) -> None:
    job_id = submit(store, steps=5, exit_at=2)
    start(MAX_ATTEMPTS=1)
    job = wait_until(store, job_id, ended)
    assert job.error
    assert (job.status, job.error["code"]) == ("failed", "engine_exited")
    assert "status 3" in job.error["message"]
    assert "a last line on the way out" in job.error["message"]


def test_an_error_the_engine_explains_is_not_tried_again(store: Store, start: Start) -> None:
    job_id = submit(store, steps=9, fail_at=3)
    start()
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error == {
        "category": "user",
        "code": "not_finite",
        "message": "the loss is not a number",
        "param": "optimizer.student_lr",
        "retryable": False,
    }
    assert store.metrics(job_id)["reward"][-1] == (3, None)


def test_an_engine_that_cannot_be_started_says_why(store: Store, start: Start) -> None:
    job_id = submit(store)
    start(MAX_ATTEMPTS=1, ENGINE_COMMAND="/no/such/program")
    job = wait_until(store, job_id, ended)
    assert job.error
    assert (job.status, job.error["code"]) == ("failed", "engine_not_started")
    assert "/no/such/program" in job.error["message"]


def test_a_worker_that_is_told_to_stop_hands_its_job_back(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=30, every=100, step_seconds=0.04, **held(20, home))
    first = start()
    wait_until(store, job_id, at_step(4))
    first.terminate()
    assert first.wait(120) == 0
    job = store.get_job(job_id)
    assert (job.status, job.lost_attempts) == ("queued", 0)
    assert job.checkpoint_step == job.progress_step, "the engine has saved"
    let_go(home)
    start()
    assert wait_until(store, job_id, ended).status == "succeeded"
    assert [a.outcome for a in store.attempts(job_id)] == ["released", "succeeded"]
    assert_complete(store, job_id, 30)


def test_two_workers_run_a_job_once(store: Store, start: Start) -> None:
    jobs = [submit(store, steps=8) for _ in range(4)]
    start()
    start()
    for job_id in jobs:
        assert wait_until(store, job_id, ended).status == "succeeded"
        assert len(store.attempts(job_id)) == 1
        assert_complete(store, job_id, 8)


def test_slots_run_side_by_side(store: Store, start: Start) -> None:
    jobs = [submit(store, steps=10_000, every=10_000) for _ in range(2)]
    start(WORKER_SLOTS=2)
    for job_id in jobs:
        wait_until(store, job_id, at_step(1))
    assert [store.get_job(job_id).status for job_id in jobs] == ["running", "running"]


def freeze(worker: subprocess.Popen[bytes], home: Path) -> None:
    """Stops the worker, but not while it holds SQLite's write lock: it would stop everybody."""
    for _ in range(100):
        worker.send_signal(signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)  # until its last thread stands still
        try:
            with closing(sqlite3.connect(home / "bridge.db", timeout=0.2)) as probe:
                probe.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            worker.send_signal(signal.SIGCONT)
            time.sleep(0.01)
    raise AssertionError("the worker never let go of the database")


def test_a_paused_worker_that_wakes_too_late_is_fenced_off(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=60, every=5, step_seconds=0.05, **held(40, home))
    first = start(**SHORT)
    wait_until(store, job_id, at_step(6))
    freeze(first, home)
    engine, attempt = pid_of(home, job_id), store.get_job(job_id).attempt
    start()
    wait_until(store, job_id, lambda job: job.attempt == attempt + 1)
    os.kill(first.pid, signal.SIGCONT)
    assert gone(engine), "the first worker kills its engine: the job is not its own any more"
    let_go(home)
    assert wait_until(store, job_id, ended).status == "succeeded"
    assert_complete(store, job_id, 60)


def test_a_lost_run_directory_starts_over_without_losing_count(
    store: Store, start: Start, home: Path
) -> None:
    job_id = submit(store, steps=30, every=5, step_seconds=0.04, **held(20, home))
    first = start()
    wait_until(store, job_id, at_step(7))
    first.terminate()
    first.wait(120)
    shutil.rmtree(home / "runs" / job_id)
    let_go(home)
    start()
    assert wait_until(store, job_id, ended).status == "succeeded"
    assert_complete(store, job_id, 30)


def test_worker_waits_for_the_tables(home: Path, store: Store, start: Start) -> None:
    (home / "bridge.db").rename(home / "later.db")
    worker = start()
    until(lambda: "python -m service migrate" in (home / "worker.log").read_text())
    assert worker.poll() is None
    for leftover in home.glob("bridge.db*"):
        leftover.unlink(missing_ok=True)  # who closes the database last takes some along
    (home / "later.db").rename(home / "bridge.db")


def test_worker_loads_no_torch() -> None:
    code = (
        "import sys, worker.__main__, worker.local, worker.relay, worker.tasks;"
        "print({'torch', 'transformers', 'peft', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# --------------------------------------------------------------------------- pause, retry, GPUs


def test_a_paused_job_resumes_from_its_checkpoint(store: Store, start: Start, home: Path) -> None:
    job_id = submit(store, steps=40, every=100, step_seconds=0.05, **held(30, home))
    start()
    wait_until(store, job_id, at_step(3))
    assert store.request(job_id, "pause").status == "pausing"
    paused = wait_until(store, job_id, lambda job: job.status == "paused")
    assert paused.checkpoint_step == paused.progress_step < 40, "the engine has saved"
    other = submit(store, steps=2)
    assert wait_until(store, other, ended).status == "succeeded", "its worker is free"
    assert store.get_job(job_id).attempt == 1
    let_go(home)
    store.request(job_id, "resume")
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt, job.lost_attempts) == ("succeeded", 2, 0)
    assert_complete(store, job_id, 40)
    assert [a.outcome for a in store.attempts(job_id)] == ["paused", "succeeded"]


def test_a_failed_job_is_retried_from_its_checkpoint(store: Store, start: Start) -> None:
    """What its run said last, that it failed, is no reason to fail again."""
    job_id = submit(store, steps=10, every=4, fail_at=6)
    start()
    assert wait_until(store, job_id, ended).status == "failed"
    with store.write() as session:  # what was wrong has been put right
        job = session.get_one(JobRow, job_id)
        job.spec = {**job.spec, "name": None}
    store.request(job_id, "retry")
    job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt, job.error) == ("succeeded", 2, None)
    resumed = [e.data["step"] for e in store.events_after(job_id) if e.type == "resume"]
    assert resumed == [4]
    assert_complete(store, job_id, 10)


def test_jobs_of_one_worker_never_share_a_gpu(store: Store, start: Start, home: Path) -> None:
    jobs = [submit(store, steps=30, gpus=1, **held(20, home)) for _ in range(2)]
    alone = submit(store, steps=2, gpus=0)
    start(GPUS="5,7", WORKER_SLOTS=3)
    for job_id in jobs:
        wait_until(store, job_id, at_step(1))
    let_go(home)  # one after the other they might have had the same
    for job_id in (*jobs, alone):
        assert wait_until(store, job_id, ended).status == "succeeded"
    shown = [(home / "runs" / job_id / "devices").read_text() for job_id in (*jobs, alone)]
    assert sorted(shown) == ["", "5", "7"]
    assert store.project("default").gpu_seconds_used > 0
