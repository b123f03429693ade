"""Who works on what: claims, leases, fencing, and what happens when a worker is lost.

A job belongs to the attempt that claimed it last. `attempt` rises with every claim and every write
of a worker names its attempt: one whose lease ran out and was given away is refused, however late
its write comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.store.database import Database, clean, epoch_now
from service.store.errors import StaleAttempt, breakdown
from service.store.jobs import forget_messages
from service.store.models import AttemptRow, JobRow, OutboxRow
from service.store.status import OWNED, origins

End = Literal["succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class Claim:
    """A job taken, and the token to write about it."""

    job: JobRow
    attempt: int


class Leases(Database):
    """The part of the store that workers work with."""

    max_attempts: int = 5
    """A job that broke down this often in a row, without a new checkpoint, is given up."""

    def claim(self, job_id: str, worker_id: str, lease_seconds: float) -> Claim | None:
        """Takes a queued job; None if it is not queued any more (somebody was faster)."""
        with self.write() as session:
            return _claim(session, job_id, worker_id, lease_seconds)

    def claim_next(self, worker_id: str, lease_seconds: float) -> Claim | None:
        """Takes the queued job that was submitted first; None if none waits."""
        queued = select(JobRow.id).where(JobRow.status == "queued").order_by(JobRow.id).limit(1)
        with self.read() as session:
            # A look that costs nobody the write lock: most polls find nothing.
            if session.scalar(queued) is None:
                return None
        with self.write() as session:
            # Postgres: look past rows that other claimers are taking at this moment.
            job_id = session.scalar(queued.with_for_update(skip_locked=True))
            return None if job_id is None else _claim(session, job_id, worker_id, lease_seconds)

    def overdue_job(self, seconds: float) -> str | None:
        """The job that has been queued the longest, if that is so long already; only looked at."""
        long = _long_ago(JobRow.queued_at, seconds)
        waiting = select(JobRow.id).where(JobRow.status == "queued", long)
        with self.read() as session:
            return session.scalar(waiting.order_by(JobRow.queued_at).limit(1))

    def heartbeat(self, job_id: str, attempt: int, lease_seconds: float) -> str:
        """Renews the lease; returns what the owner wants: `run` or `cancel`.

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
        """Hands the job back: queued again, or cancelled if that is wanted.

        With an `error` the attempt broke down: it counts, and when too many have done so in a row
        the job fails with this error. Raises StaleAttempt if this attempt does not own the job.
        """
        with self.write() as session:
            job = owned(session, job_id, attempt)
            _give_up(session, job, error, self.max_attempts)
            return job

    def requeue_expired(self) -> list[str]:
        """Takes jobs from workers that were silent for longer than their lease.

        They are queued again (ids returned), cancelled if that is wanted, or fail with
        `worker_lost` when too many attempts in a row were lost.
        """
        expired = (
            select(JobRow)
            .where(JobRow.status.in_(OWNED), JobRow.lease_expires_at < epoch_now())
            .order_by(JobRow.id)
        )
        with self.read() as session:
            if session.scalar(expired.limit(1)) is None:
                return []
        with self.write() as session:
            jobs = session.scalars(expired.with_for_update(skip_locked=True)).all()
            for job in jobs:
                _give_up(session, job, _worker_lost(job), self.max_attempts)
            return [job.id for job in jobs if job.status == "queued"]

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

    # ------------------------------------------------------------------ the outbox

    def outbox_batch(self, limit: int = 100) -> list[OutboxRow]:
        """Messages to be sent, oldest first."""
        unsent = select(OutboxRow).where(OutboxRow.sent_at.is_(None))
        with self.read() as session:
            return list(session.scalars(unsent.order_by(OutboxRow.id).limit(limit)))

    def mark_sent(self, ids: Sequence[int]) -> None:
        """The messages went out. They are kept until their job is claimed."""
        sent = update(OutboxRow).where(OutboxRow.id.in_(ids)).values(sent_at=datetime.now(UTC))
        if ids:
            with self.write() as session:
                session.execute(sent)

    def resend_unclaimed(self, older_than_seconds: float, at_broker: int = 0) -> int:
        """Puts messages that were sent so long ago, and whose job still waits, up for sending
        again; returns how many.

        Only if some were lost: if more jobs wait for their message to arrive than the broker holds
        messages (`at_broker`, counted before this call). Which of them is lost cannot be told, so
        all the old ones go out again; a message too many does no harm.
        """
        lost = _long_ago(OutboxRow.sent_at, older_than_seconds)
        # The young ones count here too: they may be all that the broker holds.
        sent = select(func.count()).where(OutboxRow.sent_at.is_not(None))
        with self.read() as session:
            if session.scalar(select(OutboxRow.id).where(lost).limit(1)) is None:
                return 0
            if (session.scalar(sent) or 0) <= at_broker:
                return 0
        with self.write() as session:
            again = update(OutboxRow).where(lost).values(sent_at=None).returning(OutboxRow.id)
            return len(session.scalars(again).all())


def _long_ago(moment: InstrumentedAttribute[Any], seconds: float) -> ColumnElement[bool]:
    """Is it so long ago, or so far in the future: before somebody's clock was set back?"""
    now, long = datetime.now(UTC), timedelta(seconds=seconds)
    return or_(moment < now - long, moment > now + long)


def owned(session: Session, job_id: str, attempt: int) -> JobRow:
    """The job's row, locked; raises StaleAttempt unless `attempt` owns it. The fence."""
    query = select(JobRow).where(
        JobRow.id == job_id, JobRow.attempt == attempt, JobRow.status.in_(OWNED)
    )
    job = session.scalar(query.with_for_update())
    if job is None:
        raise StaleAttempt(job_id, attempt)
    return job


def _claim(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> Claim | None:
    now = datetime.now(UTC)
    take = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == "queued")
        .values(
            status="running",
            attempt=JobRow.attempt + 1,
            worker_id=worker_id,
            lease_expires_at=epoch_now() + lease_seconds,
        )
        .returning(JobRow.attempt)
    )
    attempt = session.scalar(take)
    if attempt is None:
        return None
    job = session.get_one(JobRow, job_id, populate_existing=True)
    job.started_at = job.started_at or now
    session.add(AttemptRow(job_id=job_id, attempt=attempt, worker_id=worker_id, started_at=now))
    forget_messages(session, [job_id])
    return Claim(job, attempt)


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
    job.status, job.worker_id, job.lease_expires_at = status, None, None
    attempt = session.get_one(AttemptRow, (job.id, job.attempt))
    attempt.ended_at, attempt.outcome, attempt.error = now, outcome, error
    if status == "queued":
        job.queued_at = now
        session.add(OutboxRow(job_id=job.id, created_at=now))
    else:
        job.finished_at, job.error, job.result = now, error, result


def _give_up(
    session: Session, job: JobRow, error: dict[str, Any] | None, max_attempts: int
) -> None:
    cancelled = job.wanted == "cancel"
    outcome = "lost"
    if error is None:  # it left as it was told to
        outcome = "cancelled" if cancelled else "released"
    else:
        job.lost_attempts += 1
    if cancelled:
        _end(session, job, "cancelled", outcome, None)
    elif error is not None and job.lost_attempts >= max_attempts:
        tries = f" Given up: it broke down {job.lost_attempts} times without a new checkpoint."
        _end(session, job, "failed", outcome, {**error, "message": error["message"] + tries})
    else:
        _end(session, job, "queued", outcome, error)


def _worker_lost(job: JobRow) -> dict[str, Any]:
    silent = f"Worker {job.worker_id} was not heard of until its lease ran out; see its log."
    return breakdown("infra", "worker_lost", silent)
