"""An engine that lives and reports nothing is found, asked where it stands, and ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from bridge_engine.spec.train import RuntimeSpec
from service.settings import Settings
from service.store import Store
from tests.integration.test_torchrun import ENGINE as RANK_ENGINE
from tests.integration.test_torchrun import SPEC as RANK_SPEC
from tests.integration.test_worker import (
    REPOSITORY,
    Start,
    at_step,
    ended,
    home,
    pid_of,
    start,
    store,
)
from tests.support.jobs import spec, submit, wait_until
from tests.support.waiting import gone, until
from worker.execute import execute_job
from worker.family import WORD, family
from worker.forward import Forwarder
from worker.stall import _where

__all__ = ["home", "start", "store"]  # fixtures of the worker's tests


def test_an_engine_that_hangs_is_asked_where_ended_and_gone_on_from_its_checkpoint(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its silence counts from where the script hangs: before, only the machine can be slow."""
    store = Store(f"sqlite:///{home / 'bridge.db'}", max_attempts=2, retry_seconds=0)
    job_id = submit(store, steps=10, every=4, hang_at=6)
    hung, silence = home / "runs" / job_id / "hung", Forwarder.silence
    monkeypatch.setattr(
        Forwarder,
        "silence",
        lambda self: silence(self) * (1000 if hung.exists() and self.step == 6 else 0),
    )
    engine = [sys.executable, "-m", "tests.support.scripted_engine"]
    settings = Settings(home=home, engine_command=engine, stall_seconds=1000, poll_seconds=0.05)
    options = {"store": store, "settings": settings, "worker_id": "w", "stop": threading.Event()}
    for status in ("queued", "failed"):
        hung.unlink(missing_ok=True)
        assert execute_job(job_id, **options) == status
    job = store.get_job(job_id)
    assert job.error
    assert (job.status, job.attempt) == ("failed", 2)
    assert (job.error["category"], job.error["code"]) == ("infra", "engine_stalled")
    assert "at step 6 in phase training" in job.error["message"]
    assert " in _misbehave ← scripted_engine.py:" in job.error["message"]
    assert "most recent call first" in (home / "runs" / job_id / "engine.log").read_text()
    (resumed,) = (e.step for e in store.events_after(job_id, limit=1000) if e.type == "resume")
    assert resumed == 4
    assert gone(pid_of(home, job_id))


MANY_STACKS = """
import faulthandler, signal, sys, threading, time
def deep(times):
    deep(times - 1) if times else time.sleep(600)
faulthandler.register(signal.SIGUSR1, all_threads=True)
for _ in range(90):
    threading.Thread(target=deep, args=(95,), daemon=True).start()
print("ready", file=sys.stderr, flush=True)
deep(3)
"""
"""Half a megabyte of them, the main thread's at the end."""


def test_an_engine_that_is_slow_to_say_where_it_stands_is_heard_to_the_end(tmp_path: Path) -> None:
    """It is stopped in the middle of its answer, as a busy machine may do."""
    log = tmp_path / "engine.log"
    with log.open("w") as file:
        engine = subprocess.Popen([sys.executable, "-c", MANY_STACKS], stderr=file)
    try:
        until(lambda: "ready" in log.read_text())
        before = log.stat().st_size

        class Slow(psutil.Process):
            def send_signal(self, number: int) -> None:
                super().send_signal(number)
                while log.stat().st_size == before:
                    pass
                self.suspend()
                threading.Timer(1, self.resume).start()

        said = _where(Slow(engine.pid), log)
    finally:
        engine.kill()
        engine.wait()
    assert said.startswith(f"pid {engine.pid} at <string>:4 in deep ← ")


def test_a_spec_says_how_long_its_steps_may_take(store: Store, start: Start) -> None:
    given = spec(steps=3, step_seconds=6)
    patient = given.model_copy(update={"runtime": RuntimeSpec(stall_seconds=1000)})
    job, _ = store.create_job(patient, total_steps=3)
    start(STALL_SECONDS=4)
    found = wait_until(store, job.id, ended)
    assert (found.status, found.attempt) == ("succeeded", 1)


def test_a_rank_that_stands_still_is_found_named_and_ended(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real engines under torchrun, in a collective that will never end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    stopped, silence = threading.Event(), Forwarder.silence
    monkeypatch.setattr(
        Forwarder, "silence", lambda self: silence(self) * (1000 if stopped.is_set() else 0)
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings = Settings(
        home=home,
        engine_command=[*torchrun, "--nproc-per-node=2", str(RANK_ENGINE)],
        stall_seconds=3000,
        max_attempts=1,
    )
    ranked = type(spec()).model_validate({**RANK_SPEC, "steps": 10_000})
    job, _ = store.create_job(ranked, total_steps=10_000)
    monkeypatch.setattr(store, "max_attempts", 1)
    options = {"store": store, "settings": settings, "worker_id": "w", "stop": threading.Event()}
    thread = threading.Thread(target=execute_job, args=(job.id,), kwargs=options)
    thread.start()
    wait_until(store, job.id, at_step(1), seconds=200)
    family_of_job = everything_of(job.id)
    ranks = {rank: process for process in family_of_job if (rank := rank_of(process))}
    assert set(ranks) == {"0", "1"}
    ranks["1"].suspend()
    stopped.set()
    thread.join(120)
    error = store.get_job(job.id).error
    assert error
    assert error["code"] == "engine_stalled"
    assert f"pid {ranks['1'].pid} is stopped" in error["message"]
    assert f"pid {ranks['0'].pid} at " in error["message"]
    assert all(gone(process.pid) for process in family_of_job)


def rank_of(process: psutil.Process) -> str | None:
    """None of one that is no rank, or has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


def everything_of(job_id: str) -> list:
    """All processes of the engines that this process has started for the job."""
    words = set()
    for process in psutil.process_iter():
        try:
            if any(job_id in word for word in process.cmdline()):
                words.add(process.environ().get(WORD))
        except psutil.Error:
            continue
    return [process for word in words if word for process in family(word)]
