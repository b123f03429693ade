"""The store against a model of a few lines: whatever owners and workers do, in whatever order.

Several workers claim, beat, report, finish, hand back and fall silent; the owner submits, pauses,
resumes, cancels, retries and changes priorities. After each step the database must say what the
model says, and the invariants must hold. Time is moved by moving leases, never by waiting.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select, update

from service.store import (
    AttemptRow,
    Conflict,
    JobRow,
    OutboxRow,
    Request,
    StaleAttempt,
    Store,
    breakdown,
)
from service.store.status import OWNED, REQUESTS, TERMINAL, TRANSITIONS
from tests.support.jobs import LONG, checkpoint, numbered, submit

QUOTAS: dict[str, int | None] = {"default": None, "one": 1, "two": 2}
MAX_ATTEMPTS = 3
BROKEN = breakdown("infra", "engine_killed", "killed.")


@dataclass
class Model:
    """What is known of one job."""

    project: str
    priority: int = 0
    status: str = "queued"
    attempt: int = 0
    lost: int = 0
    retries: int = 0
    checkpoint: int = 0
    seq: int = 0
    left: list[str] = field(default_factory=list)
    """Every status it has left, in order."""

    def become(self, status: str) -> None:
        assert status in TRANSITIONS[self.status], f"{self.status} → {status}"  # type: ignore[index]
        self.left.append(self.status)
        self.status = status

    def give_up(self, broke: bool) -> None:
        """Its worker left it, or was lost."""
        self.lost += broke
        if self.status == "cancelling":
            self.become("cancelled")
        elif self.status == "pausing":
            self.become("paused")
        elif broke and self.lost >= MAX_ATTEMPTS:
            self.become("failed")
        else:
            self.become("queued")


@dataclass(frozen=True)
class Held:
    """A claim as a worker remembers it, for ever: a slow one writes long after it lost the job."""

    job: str
    attempt: int


class Machine(RuleBasedStateMachine):
    """`store` is set by the test, to an empty database each time."""

    store: Store
    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def begin(self) -> None:
        self.model: dict[str, Model] = {}
        self.served = dict.fromkeys(QUOTAS, 0)
        self.clock = 0
        for name, quota in QUOTAS.items():
            if name != "default":
                self.store.create_project(name, project_id=name, max_running=quota)

    # ------------------------------------------------------------------ the owner

    @rule(target=jobs, project=st.sampled_from(sorted(QUOTAS)), priority=st.integers(-1, 1))
    def submit(self, project: str, priority: int) -> str:
        job_id = submit(self.store, project=project, priority=priority)
        self.model[job_id] = Model(project, priority)
        return job_id

    @rule(job_id=jobs, request=st.sampled_from(get_args(Request)))
    def ask(self, job_id: str, request: Request) -> None:
        job = self.model[job_id]
        after = REQUESTS[request].get(job.status)  # type: ignore[call-overload]
        if request == "retry" and job.retries and job.status in ("queued", "running"):
            after = job.status
        if after is None:
            with pytest.raises(Conflict):
                self.store.request(job_id, request)
            return
        self.store.request(job_id, request)
        if after != job.status:
            job.become(after)
            if request == "retry":
                job.retries, job.lost = job.retries + 1, 0

    @rule(job_id=jobs, priority=st.integers(-1, 1))
    def prioritise(self, job_id: str, priority: int) -> None:
        job = self.model[job_id]
        if job.status in ("queued", "paused"):
            self.store.set_priority(job_id, priority)
            job.priority = priority

    # ------------------------------------------------------------------ workers

    def _running(self, project: str) -> int:
        return sum(j.project == project and j.status in OWNED for j in self.model.values())

    def _admissible(self, job: Model) -> bool:
        quota = QUOTAS[job.project]
        free = quota is None or self._running(job.project) < quota
        return job.status == "queued" and free

    def _took(self, job_id: str) -> Held:
        job = self.model[job_id]
        self.clock += 1
        self.served[job.project] = self.clock
        job.become("running")
        job.attempt += 1
        return Held(job_id, job.attempt)

    @rule(target=claims, job_id=jobs, worker=st.sampled_from("ab"))
    def hear_a_message(self, job_id: str, worker: str) -> Any:
        claim = self.store.claim(job_id, worker, LONG)
        assert (claim is not None) == self._admissible(self.model[job_id])
        if claim is None:
            return multiple()
        held = self._took(job_id)
        assert claim.attempt == held.attempt
        return held

    @rule(target=claims, worker=st.sampled_from("ab"))
    def look_for_a_job(self, worker: str) -> Any:
        order = {
            job_id: (-job.priority, self._running(job.project), self.served[job.project], job_id)
            for job_id, job in self.model.items()
            if self._admissible(job)
        }
        claim = self.store.claim_next(worker, LONG)
        assert (claim and claim.job.id) == min(order, key=order.__getitem__, default=None)
        return multiple() if claim is None else self._took(claim.job.id)

    def _owns(self, held: Held) -> bool:
        job = self.model[held.job]
        return job.attempt == held.attempt and job.status in OWNED

    @rule(held=claims)
    def beat(self, held: Held) -> None:
        if not self._owns(held):
            with pytest.raises(StaleAttempt):
                self.store.heartbeat(held.job, held.attempt, LONG)
            return
        wanted = self.store.heartbeat(held.job, held.attempt, LONG)
        stops = {"pausing": "pause", "cancelling": "cancel"}
        assert wanted == stops.get(self.model[held.job].status, "run")

    @rule(held=claims)
    def save(self, held: Held) -> None:
        job = self.model[held.job]
        events = numbered(checkpoint(job.checkpoint + 1), start=job.seq + 1)
        if not self._owns(held):
            with pytest.raises(StaleAttempt):
                self.store.append_events(held.job, held.attempt, events)
            return
        self.store.append_events(held.job, held.attempt, events)
        job.seq, job.checkpoint, job.lost = job.seq + 1, job.checkpoint + 1, 0

    @rule(held=claims, status=st.sampled_from(["succeeded", "failed"]))
    def finish(self, held: Held, status: Any) -> None:
        if not self._owns(held):
            with pytest.raises(StaleAttempt):
                self.store.finish(held.job, held.attempt, status)
            return
        self.store.finish(held.job, held.attempt, status)
        self.model[held.job].become(status)

    @rule(held=claims, broke=st.booleans())
    def hand_back(self, held: Held, broke: bool) -> None:
        error = BROKEN if broke else None
        if not self._owns(held):
            with pytest.raises(StaleAttempt):
                self.store.release(held.job, held.attempt, error)
            return
        self.store.release(held.job, held.attempt, error)
        self.model[held.job].give_up(broke)

    @rule(held=claims)
    def fall_silent(self, held: Held) -> None:
        """Its lease runs out, and the reconciler comes by."""
        expired = update(JobRow).where(JobRow.id == held.job, JobRow.status.in_(OWNED))
        with self.store.write() as session:
            session.execute(expired.values(lease_expires_at=1.0))
        requeued = self.store.requeue_expired()
        job, was_held = self.model[held.job], self.model[held.job].status in OWNED
        if was_held:
            job.give_up(broke=True)
        assert requeued == ([held.job] if was_held and job.status == "queued" else [])

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def everything_holds(self) -> None:
        counted = select(OutboxRow.job_id, func.count()).group_by(OutboxRow.job_id)
        with self.store.read() as session:
            rows = {row.id: row for row in session.scalars(select(JobRow))}
            messages = dict(session.execute(counted).all())
            attempts = session.scalars(select(AttemptRow).order_by(AttemptRow.attempt)).all()
        assert set(rows) == set(self.model)
        for job_id, job in self.model.items():
            self._as_the_model_says(rows[job_id], job, messages.get(job_id, 0))
            tried = [a for a in attempts if a.job_id == job_id]
            assert [a.attempt for a in tried] == list(range(1, job.attempt + 1))
            at_it = [a.attempt for a in tried if a.ended_at is None]
            assert at_it == ([job.attempt] if job.status in OWNED else []), "one owner, or none"
        for name, quota in QUOTAS.items():
            running = [r for r in rows.values() if r.project_id == name and r.status in OWNED]
            assert quota is None or len(running) <= quota

    def _as_the_model_says(self, row: JobRow, job: Model, messages: int) -> None:
        assert (row.status, row.attempt, row.lost_attempts, row.retries, row.priority) == (
            *(job.status, job.attempt, job.lost, job.retries, job.priority),
        )
        assert (row.worker_id is not None) == (row.status in OWNED)
        assert messages == (row.status == "queued"), "one message if it waits, else none"
        assert (row.finished_at is not None) == (row.status in TERMINAL)
        ends_left = sum(status in TERMINAL for status in job.left)
        assert ends_left == job.retries, "an end is left by a retry alone"


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_the_store_does_what_the_model_does(
    engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    class OnEmptyDatabase(Machine):
        def __init__(self) -> None:
            super().__init__()
            if engine == "sqlite":
                file = tmp_path / "bridge.db"
                for old in tmp_path.glob("bridge.db*"):
                    old.unlink()
                shutil.copyfile(request.getfixturevalue("migrated_sqlite"), file)
                url = f"sqlite:///{file}"
            else:
                url = request.getfixturevalue("postgres").migrated()
            self.store = Store(url, max_attempts=MAX_ATTEMPTS, retry_seconds=0)

        def teardown(self) -> None:
            self.store.close()

    run_state_machine_as_test(
        OnEmptyDatabase,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
