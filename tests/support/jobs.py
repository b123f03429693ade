"""Specs and events for tests of the store and the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from service.store import JobRow, Request, Store

LONG = 60.0
"""Seconds of a lease that no test outlives."""


def spec(
    steps: int = 10, every: int = 4, seed: int = 0, gpus: int | None = None, **script: Any
) -> TrainSpec:
    """A job for the scripted engine; `script`: see `tests.support.scripted_engine`."""
    return TrainSpec.model_validate(
        {
            "name": json.dumps(script) if script else None,
            "method": "bridge",
            "data": {"prompts": "arithmetic", "demos": "arithmetic"},
            "steps": steps,
            "seed": seed,
            "checkpoint": {"every": every},
            "resources": {"gpus": gpus},
        }
    )


def held(at: int, folder: Path) -> dict[str, Any]:
    """Of a run that goes no further than this step before `let_go(folder)`. Without it, a run that
    is to be met in its middle has ended where the test's process, or the worker's, was slow."""
    return {"hold": [at, str(folder / "go-on")]}


def let_go(folder: Path) -> None:
    """From now on what is `held` runs to its end."""
    (folder / "go-on").touch()


def submit(
    store: Store, steps: int = 10, *, project: str = "default", priority: int = 0, **options: Any
) -> str:
    """Queues a job; its id."""
    job, _ = store.create_job(
        spec(steps, **options), total_steps=steps, project_id=project, priority=priority
    )
    return job.id


def numbered(*events: ev.Event, start: int = 1) -> list[ev.Event]:
    """The events with seq and time, as a writer would have given them."""
    for seq, event in enumerate(events, start):
        event.seq, event.time = seq, 1.7e9 + seq
    return list(events)


def metric(step: int, **values: float | None) -> ev.Metric:
    """The figures of a step."""
    return ev.Metric(step=step, metrics=values or {"reward": step / 10})


def sample(step: int, completion: str = "4") -> ev.Sample:
    """A completion."""
    return ev.Sample(
        step=step, source="rollout", problem="2+2=", completion=completion, gold="4", reward=1.0
    )


def checkpoint(step: int, accuracy: float | None = None) -> ev.Checkpoint:
    """A checkpoint."""
    name = f"step-{step:06d}"
    return ev.Checkpoint(
        step=step,
        path=f"checkpoints/{name}",
        adapter=f"adapters/{name}",
        sha256="0" * 64,
        rank=8,
        accuracy=accuracy,
    )


def wait_until(
    store: Store, job_id: str, true: Callable[[JobRow], bool], seconds: float = 180
) -> JobRow:
    """The job, once it is as it should be; fails with what it was last."""
    until = time.monotonic() + seconds
    while True:
        job = store.get_job(job_id)
        if true(job):
            return job
        if time.monotonic() > until:
            raise AssertionError(
                f"{job_id} is {job.status} at step {job.progress_step}, attempt {job.attempt}, "
                f"error {job.error}"
            )
        time.sleep(0.05)


def run_to(store: Store, status: str) -> str:
    """A new job, brought into the given status."""
    job_id = submit(store)
    if status == "queued":
        return job_id
    if status in ("cancelled", "paused"):
        request: Request = "cancel" if status == "cancelled" else "pause"
        return store.request(job_id, request).id
    claim = store.claim(job_id, "w", LONG)
    assert claim
    if status == "cancelling":
        store.request_cancel(job_id)
    if status == "pausing":
        store.request(job_id, "pause")
    if status in ("succeeded", "failed"):
        store.finish(job_id, claim.attempt, status)
    assert store.get_job(job_id).status == status
    return job_id


def in_parallel(work: Callable[[], object], times: int) -> None:
    """Does the work in several threads that start at the same moment; fails as any of them does."""
    gate, failures = threading.Barrier(times), list[BaseException]()

    def start() -> None:
        gate.wait()
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
