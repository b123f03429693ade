"""The deployed form's queue: a real Redis, a real Postgres, a real Celery worker and the relay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import update

from service.store import JobRow, OutboxRow, Store
from tests.support.jobs import LONG, held, let_go, submit, wait_until
from tests.support.postgres import Postgres
from tests.support.scripted_engine import reward
from tests.support.waiting import gone, until
from worker import relay

REPOSITORY = Path(__file__).parents[2]
CELERY = ["-m", "celery", "-A", "worker.tasks", "worker", "--loglevel", "INFO"]
RELAY = ["-m", "worker", "relay"]
SHORT = {"BRIDGE_LEASE_SECONDS": "5"}
"""A lease whose end a test waits for."""


@pytest.fixture
def database(postgres: Postgres) -> str:
    return postgres.migrated()


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


@pytest.fixture
def environment(database: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    redis.Redis.from_url(redis_url).flushall()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
    return {
        **clean,
        "BRIDGE_HOME": str(tmp_path),
        "BRIDGE_DATABASE_URL": database,
        "BRIDGE_REDIS_URL": redis_url,
        "BRIDGE_DISPATCH": "celery",
        "BRIDGE_ENGINE_COMMAND": f"{sys.executable} -m tests.support.scripted_engine",
        "BRIDGE_LEASE_SECONDS": str(LONG),
        "BRIDGE_HEARTBEAT_SECONDS": "0.3",
        "BRIDGE_GRACE_SECONDS": str(LONG),
        "BRIDGE_RECONCILE_SECONDS": "0.3",
        "BRIDGE_RETRY_SECONDS": "0.1",
        "BRIDGE_RESEND_SECONDS": "1",
        "BRIDGE_POLL_SECONDS": "0.05",
    }


@contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the deployed form; it is told to stop at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ended(job: JobRow) -> bool:
    return job.ended


def test_a_message_with_the_id_alone_runs_the_job(
    store: Store, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    job_id = submit(store, steps=8)
    with ExitStack() as stack:
        stack.enter_context(running(RELAY, environment, tmp_path / "relay.log"))
        broker = redis.Redis.from_url(redis_url)
        until(lambda: broker.llen("any"), otherwise=(tmp_path / "relay.log").read_text)
        assert store.get_job(job_id).status == "queued"
        (message,) = broker.lrange("any", 0, -1)
        assert job_id.encode() in b64decode(json.loads(message)["body"])
        stack.enter_context(running(CELERY, environment, tmp_path / "celery.log"))
        job = wait_until(store, job_id, ended)
        assert job.status == "succeeded"
        assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 9)]
    assert "claimed job=" in (tmp_path / "celery.log").read_text()


def test_a_message_delivered_three_times_runs_once(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = submit(store, steps=8)
    send = (
        "import sys; from worker.tasks import run_job;"
        "[run_job.apply_async(args=[sys.argv[1]]) for _ in range(3)]"
    )
    subprocess.run(
        [sys.executable, "-c", send, job_id], cwd=REPOSITORY, env=environment, check=True
    )
    log = tmp_path / "celery.log"
    with running([*CELERY, "--concurrency", "2"], environment, log):
        assert wait_until(store, job_id, ended).status == "succeeded"
        until(lambda: log.read_text().count("message dropped") >= 2, otherwise=log.read_text)
    assert [a.attempt for a in store.attempts(job_id)] == [1]
    assert len(store.samples(job_id)) == 8


def test_lost_messages_and_a_killed_worker_do_no_harm(
    store: Store, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    job_id = submit(store, steps=30, every=5, step_seconds=0.05, **held(20, tmp_path))
    with ExitStack() as stack:
        stack.enter_context(running(RELAY, environment, tmp_path / "relay.log"))
        broker = redis.Redis.from_url(redis_url)
        until(lambda: broker.llen("any"))
        broker.flushall()  # the broker loses its memory
        log = tmp_path / "celery.log"
        first = stack.enter_context(running(CELERY, environment, log))
        wait_until(store, job_id, lambda job: job.progress_step >= 7)
        first.kill()
        let_go(tmp_path)
        with store.write() as session:  # its lease, which is a long one, runs out
            session.execute(update(JobRow).values(lease_expires_at=1.0))
        stack.enter_context(running(CELERY, environment, log))
        job = wait_until(store, job_id, ended)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 31)]
    assert "messages were lost" in (tmp_path / "relay.log").read_text()


def test_a_lost_message_is_sent_again_while_the_queue_is_never_empty(
    store: Store, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    """No worker takes anything: what waits at the broker waits for ever."""
    jobs = [submit(store) for _ in range(2)]
    broker = redis.Redis.from_url(redis_url)

    def waiting() -> list[str]:
        messages = [b64decode(json.loads(m)["body"]) for m in broker.lrange("any", 0, -1)]
        return sorted(job_id for job_id in jobs for m in messages if job_id.encode() in m)

    with running(RELAY, environment, tmp_path / "relay.log"):
        said = (tmp_path / "relay.log").read_text
        until(lambda: waiting() == jobs and not store.outbox_batch(), otherwise=said)
        with store.write() as session:  # or one is old enough to be missed, and the other not yet
            long_ago = datetime.now(UTC) - timedelta(minutes=1)
            session.execute(update(OutboxRow).values(sent_at=long_ago))
        taken = b64decode(json.loads(broker.lpop("any"))["body"])
        (lost,) = (job_id for job_id in jobs if job_id.encode() in taken)
        until(lambda: lost in waiting(), otherwise=said)
        time.sleep(2.5)  # two times as long as it takes to miss a message
        assert len(waiting()) == 3, "messages that are there are not sent again and again"


def _told(job_id: str) -> None:
    """What the relay sends goes to a worker, of which there is none here."""


def test_a_broker_that_answers_with_an_error_is_one_out_of_reach(
    store: Store, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not let this user look does, and one that has no memory left, or no master."""
    broker = redis.Redis.from_url(redis_url)
    broker.acl_setuser(
        "blind",
        enabled=True,
        passwords=["+p"],
        keys=["*"],
        channels=["*"],
        commands=["+@all", "-exists", "-llen"],
    )
    blind = Celery(broker=redis_url.replace("//", "//blind:p@"), set_as_current=False)
    monkeypatch.setattr(relay, "app", blind)
    with pytest.raises(OperationalError, match="no permissions"):
        relay.queue_lengths()
    app = Celery(broker=redis_url, set_as_current=False)
    monkeypatch.setattr(relay, "app", app)
    monkeypatch.setattr(relay, "run_job", app.task(name="run_job")(_told))
    submit(store)
    broker.config_set("replica-serve-stale-data", "no")
    broker.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(OperationalError, match="MASTER is down"):
            relay.queue_lengths()
    finally:
        broker.replicaof("NO", "ONE")
        broker.config_set("replica-serve-stale-data", "yes")
    broker.config_set("maxmemory", 1)
    try:
        with pytest.raises(OperationalError, match="memory"):
            relay.relay(store, 4)
    finally:
        broker.config_set("maxmemory", 0)
    assert relay.relay(store, 4) == 1, "the message waited"


def test_a_stopped_celery_worker_hands_its_job_back(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = submit(store, steps=10_000, every=10_000)
    with running(RELAY, environment, tmp_path / "relay.log"):
        with running(CELERY, environment, tmp_path / "celery.log") as worker:
            wait_until(store, job_id, lambda job: job.progress_step >= 3)
            worker.terminate()
            assert worker.wait(120) == 0
        job = store.get_job(job_id)
        assert (job.status, job.lost_attempts) == ("queued", 0)
        assert job.checkpoint_step == job.progress_step, "the engine has saved"


@pytest.mark.timeout(600)
def test_each_worker_takes_what_its_queues_say_and_gives_out_its_gpus(
    store: Store, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    """One told by `-Q`, one by its GPUs; a job that none of them serves waits and says so."""
    gpu, cpu, two = (submit(store, steps=2, gpus=gpus) for gpus in (1, 0, 2))
    with ExitStack() as stack:
        stack.enter_context(running(RELAY, environment, tmp_path / "relay.log"))
        on_gpu = {**environment, "BRIDGE_GPUS": "3"}
        command = [*CELERY, "-Q", "gpu"]
        stack.enter_context(running(command, on_gpu, tmp_path / "gpu.log"))
        wait_until(store, gpu, ended, 240)
        assert (store.get_job(cpu).status, store.get_job(two).status) == ("queued", "queued")
        assert [(w.queues, w.gpus) for w in store.live_workers()] == [(["gpu"], 1)]
        waiting = store.waiting_for([store.get_job(cpu), store.get_job(two)])
        assert waiting == {
            cpu: "a worker that serves the queue cpu",
            two: "a worker with 2 GPUs that serves the queue gpu:2",
        }
        without = {**environment, "BRIDGE_GPUS": "none"}
        stack.enter_context(running(CELERY, without, tmp_path / "cpu.log"))
        wait_until(store, cpu, ended, 240)
        assert store.get_job(two).status == "queued"
    shown = tmp_path / "runs" / gpu / "devices"
    assert shown.read_text() == "3"
    assert store.live_workers() == [], "workers that have left are not counted on"


def test_a_celery_worker_leaves_within_the_grace_and_leaves_nothing_running(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = submit(store, steps=10, ignore_term=True, hang_at=2, child=True)
    grace = {"BRIDGE_GRACE_SECONDS": "1"}
    with running(RELAY, environment, tmp_path / "relay.log"):
        with running(CELERY, environment | grace, tmp_path / "celery.log") as worker:
            wait_until(store, job_id, lambda job: job.progress_step >= 2)
            worker.terminate()
            assert worker.wait(120) == 0
        job = store.get_job(job_id)
        assert (job.status, job.lost_attempts) == ("queued", 0)
    for name in ("engine", "child"):
        assert gone(int((tmp_path / "runs" / job_id / f"{name}.pid").read_text()))


def test_jobs_run_although_the_broker_answers_nobody(
    store: Store, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    """Worker and relay are connected to it and live; no message comes through."""
    log = tmp_path / "celery.log"
    with ExitStack() as stack:
        stack.enter_context(running(RELAY, environment, tmp_path / "relay.log"))
        silence = {"BRIDGE_SILENCE_SECONDS": "2"}
        worker = stack.enter_context(running(CELERY, environment | silence, log))
        assert wait_until(store, submit(store, steps=2), ended).attempt == 1
        address = redis_url.removeprefix("redis://").partition("/")[0]
        (server,) = (p for p in psutil.process_iter(["cmdline"]) if address in _words(p))
        server.suspend()
        try:
            jobs = [submit(store, steps=8) for _ in range(2)]
            for job_id in jobs:
                assert wait_until(store, job_id, ended).status == "succeeded"
                assert f"taking it from the database job={job_id}" in log.read_text()
                assert len(store.attempts(job_id)) == 1
        finally:
            server.resume()
        assert worker.poll() is None
        later = submit(store, steps=2)
        assert wait_until(store, later, ended).status == "succeeded"


def _words(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def test_a_worker_looks_for_jobs_with_free_slots_alone(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """No relay: there are no messages at all."""
    jobs = [submit(store, steps=10_000, every=10_000) for _ in range(2)]
    silence = {"BRIDGE_SILENCE_SECONDS": "0.5"}
    log = tmp_path / "celery.log"
    with running([*CELERY, "--concurrency", "1"], environment | silence, log) as worker:
        wait_until(store, jobs[0], lambda job: job.progress_step >= 3)
        time.sleep(2)
        assert [store.get_job(job_id).status for job_id in jobs] == ["running", "queued"]
        worker.terminate()
        assert worker.wait(120) == 0
        job = store.get_job(jobs[0])
        assert (job.status, job.lost_attempts) == ("queued", 0), "handed back like any other"
        assert job.checkpoint_step == job.progress_step


def test_the_job_of_a_celery_worker_that_stands_still_goes_to_another(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = submit(store, steps=60, every=5, step_seconds=0.05, **held(40, tmp_path))
    with ExitStack() as stack:
        stack.enter_context(running(RELAY, environment, tmp_path / "relay.log"))
        first = stack.enter_context(running(CELERY, environment | SHORT, tmp_path / "first.log"))
        wait_until(store, job_id, lambda job: job.progress_step >= 7)
        first.send_signal(signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)  # until its last thread stands still
        engine = int((tmp_path / "runs" / job_id / "engine.pid").read_text())
        attempt = store.get_job(job_id).attempt
        try:
            stack.enter_context(running(CELERY, environment, tmp_path / "second.log"))
            assert gone(engine)
            let_go(tmp_path)
            job = wait_until(store, job_id, ended)
        finally:
            first.send_signal(signal.SIGCONT)
        assert (job.status, job.attempt) == ("succeeded", attempt + 1)
    assert store.metrics(job_id)["reward"] == [(s, reward(s)) for s in range(1, 61)]
