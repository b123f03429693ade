"""Who works on what: leases, fencing, and what happens when a worker is lost.

A job belongs to the attempt that claimed it last. `attempt` rises with every claim and every write
of a worker names its attempt: one whose lease ran out and was given away is refused, however late
its write comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.database import Database, clean, epoch_now
from service.store.errors import StaleAttempt, breakdown
from service.store.models import AttemptRow, JobRow, ProjectRow
from service.store.outbox import announce
from service.store.status import OWNED, origins

End = Literal["succeeded", "failed", "cancelled"]
LONGEST_BACKOFF = 300.0
"""Seconds."""


class Leases(Database):
    """The part of the store that workers work with."""

    max_attempts: int = 5
    """A job that broke down this often in a row, without a new checkpoint, is given up."""
    retry_seconds: float = 5.0
    """What a job waits that broke down once: see `backoff`."""

    def heartbeat(self, job_id: str, attempt: int, lease_seconds: float) -> str:
        """Renews the lease; returns what the owner wants: `run`, `pause` or `cancel`.

        Raises StaleAttempt if the job was given to another attempt or has ended.
        """
        renew = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.attempt == attempt, JobRow.status.in_(OWNED))
            .values(lease_expires_at=epoch_now() + lease_seconds)
            .returning(JobRow.wanted)
        )
        with self.write() as session:
            wanted = session.scalar(renew)
        if wanted is None:
            raise StaleAttempt(job_id, attempt)
        return wanted

    def wanted(self, job_id: str, attempt: int) -> str:
        """What the owner wants, as `heartbeat` says it, but only looked at: nothing is written.

        Raises StaleAttempt if the job was given to another attempt or has ended.
        """
        query = select(JobRow.wanted).where(
            JobRow.id == job_id, JobRow.attempt == attempt, JobRow.status.in_(OWNED)
        )
        with self.read() as session:
            wanted = session.scalar(query)
        if wanted is None:
            raise StaleAttempt(job_id, attempt)
        return wanted

    def finish(
        self,
        job_id: str,
        attempt: int,
        status: End,
        error: dict[str, Any] | None = None,
        result: dict[str, Any] | None = None,
    ) -> JobRow:
        """Ends the job; raises StaleAttempt if this attempt may not."""
        with self.write() as session:
            job = owned(session, job_id, attempt)
            if job.status not in origins(status):
                raise StaleAttempt(job_id, attempt)
            _end(session, job, status, status, error, result)
            return job

    def release(self, job_id: str, attempt: int, error: dict[str, Any] | None = None) -> JobRow:
        """Hands the job back: queued again, or paused or cancelled if that is wanted.

        With an `error` the attempt broke down: it counts, the job is tried again after a while
        (`backoff`), and when too many have done so in a row it fails with this error. Raises
        StaleAttempt if this attempt does not own the job.
        """
        with self.write() as session:
            job = owned(session, job_id, attempt)
            self._give_up(session, job, error)
            return job

    def requeue_expired(self) -> list[str]:
        """Takes jobs from workers that were silent for longer than their lease.

        They are queued again (ids returned), paused or cancelled if that is wanted, or fail with
        `worker_lost` when too many attempts in a row were lost.
        """
        late = JobRow.status.in_(OWNED) & (JobRow.lease_expires_at < epoch_now())
        with self.read() as session:
            ids = session.scalars(select(JobRow.id).where(late).order_by(JobRow.id)).all()
        requeued = []
        for job_id in ids:
            # A transaction each: who locks several jobs and their projects waits for who does too.
            with self.write() as session:
                expired = select(JobRow).where(JobRow.id == job_id, late)
                job = session.scalar(expired.with_for_update(skip_locked=True))
                if job is None:
                    continue  # somebody was faster, or its worker is heard of again
                self._give_up(session, job, _worker_lost(job))
                if job.status == "queued":
                    requeued.append(job_id)
        return requeued

    def release_lost(self, is_gone: Callable[[str], bool]) -> list[str]:
        """Takes jobs from workers that are known to be gone, before their leases run out.

        `is_gone` tells by a worker's id. What becomes of the jobs, and what is returned, is as in
        `requeue_expired`.
        """
        held = select(JobRow.id, JobRow.attempt, JobRow.worker_id).where(JobRow.status.in_(OWNED))
        with self.read() as session:
            claims = session.execute(held.order_by(JobRow.id)).all()
        released = []
        for job_id, attempt, worker_id in claims:
            if worker_id is None or not is_gone(worker_id):
                continue
            lost = f"Worker {worker_id} ended without a word; see its log."
            try:
                job = self.release(job_id, attempt, breakdown("infra", "worker_lost", lost))
            except StaleAttempt:
                continue  # somebody was faster
            if job.status == "queued":
                released.append(job_id)
        return released

    def _give_up(self, session: Session, job: JobRow, error: dict[str, Any] | None) -> None:
        becomes = {"cancel": "cancelled", "pause": "paused"}.get(job.wanted)
        outcome = "lost"
        if error is None:  # it left as it was told to
            outcome = becomes or "released"
        else:
            job.lost_attempts += 1
        if becomes is not None:
            _end(session, job, becomes, outcome, error if becomes == "paused" else None)
        elif error is not None and job.lost_attempts >= self.max_attempts:
            message = error["message"].rstrip()
            stop = "" if message.endswith((".", "!", "?")) else "."
            message += f"{stop} Given up: it broke down {job.lost_attempts} times without a new "
            message += "checkpoint."
            _end(session, job, "failed", outcome, {**error, "message": message})
        else:
            _end(session, job, "queued", outcome, error)
            if error is not None:
                now = session.scalar(select(epoch_now())) or 0.0
                job.not_before = now + backoff(self.retry_seconds, job.lost_attempts)


def backoff(first: float, times: int) -> float:
    """Seconds that a job waits which broke down so many times in a row: twice as long each time.

    A random part of up to a half is taken off, so that jobs which one fault took along do not come
    back as one.
    """
    longest = min(first * 2.0 ** min(times - 1, 30), LONGEST_BACKOFF)
    return longest * random.uniform(0.5, 1)


def owned(session: Session, job_id: str, attempt: int) -> JobRow:
    """The job's row, locked; raises StaleAttempt unless `attempt` owns it. The fence."""
    query = select(JobRow).where(
        JobRow.id == job_id, JobRow.attempt == attempt, JobRow.status.in_(OWNED)
    )
    job = session.scalar(query.with_for_update())
    if job is None:
        raise StaleAttempt(job_id, attempt)
    return job


def _end(
    session: Session,
    job: JobRow,
    status: str,
    outcome: str,
    error: dict[str, Any] | None,
    result: dict[str, Any] | None = None,
) -> None:
    """Takes the job from its attempt, for good or, if `status` is queued, for the next one."""
    now = datetime.now(UTC)
    error, result = clean(error), clean(result)
    _account(session, job)
    job.status, job.worker_id, job.lease_expires_at = status, None, None
    attempt = session.get_one(AttemptRow, (job.id, job.attempt))
    attempt.ended_at, attempt.outcome, attempt.error = now, outcome, error
    if status == "queued":
        job.queued_at = now
        announce(session, job.id)
    elif status != "paused":
        job.finished_at, job.error, job.result = now, error, result


def _account(session: Session, job: JobRow) -> None:
    """Adds what the attempt has used of its GPUs to the project's account: until now, or until the
    end of the lease of a worker that was lost."""
    if job.gpus_held and job.claimed_at is not None:
        now = session.scalar(select(epoch_now())) or 0.0
        until = min(now, job.lease_expires_at or now)
        used = max(0.0, until - job.claimed_at) * job.gpus_held
        session.execute(
            update(ProjectRow)
            .where(ProjectRow.id == job.project_id)
            .values(gpu_seconds_used=ProjectRow.gpu_seconds_used + used)
        )
    job.gpus_held, job.claimed_at = 0, None


def _worker_lost(job: JobRow) -> dict[str, Any]:
    silent = f"Worker {job.worker_id} was not heard of until its lease ran out; see its log."
    return breakdown("infra", "worker_lost", silent)
