"""Taking jobs: which one, whether it may run now, and the claim itself.

The claim is where quotas hold. It locks the job, then the project, and counts what the project has
under way before it takes the job: two workers that claim at the same moment do so one after the
other. Whoever locks both takes them in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.store.database import Database, epoch_now, long_ago
from service.store.models import AttemptRow, JobRow, OutboxRow, ProjectRow
from service.store.outbox import forget_messages
from service.store.queues import (
    Offer,
    has_gpu_hours,
    has_room,
    may_go_to,
    next_queued,
    under_way,
)

ANYTHING = Offer()
DECLINED_SECONDS = 5.0
"""A job that could not be taken is not told of again for so long."""
TRIES = 5
"""Claimers that look at the same moment see the same job; who loses the race looks again."""


@dataclass(frozen=True)
class Claim:
    """A job taken, and the token to write about it."""

    job: JobRow
    attempt: int
    gpus: int = 0
    """How many it holds."""
    devices: tuple[str, ...] | None = None
    """Which ones, by the worker's own account; None: it does not count them."""


class Claims(Database):
    """The part of the store that gives jobs to workers."""

    def claim(
        self, job_id: str, worker_id: str, lease_seconds: float, offer: Offer = ANYTHING
    ) -> Claim | None:
        """Takes a queued job; None if it is not queued any more (somebody was faster), or may not
        be taken now: a quota is reached, the worker has not the GPUs, or the job broke down and is
        to wait or to go elsewhere (`queues`). Of one that still waits, a message comes again
        later."""
        with self.write() as session:
            claim = _claim(session, job_id, worker_id, lease_seconds, offer)
            if claim is None:
                later = epoch_now() + DECLINED_SECONDS
                again = update(OutboxRow).where(OutboxRow.job_id == job_id)
                session.execute(again.values(sent_at=None, not_before=later))
            return claim

    def claim_next(
        self, worker_id: str, lease_seconds: float, offer: Offer = ANYTHING
    ) -> Claim | None:
        """Takes the job whose turn it is (`queues`) of those that the offer fits; None if none
        waits, or none may be taken now."""
        if not (wanted := offer.wanted):
            return None
        query = next_queued(wanted, worker_id)
        with self.read() as session:
            # A look that costs nobody the write lock: most polls find nothing.
            if session.scalar(query) is None:
                return None
        for _ in range(TRIES):
            with self.write() as session:
                job_id = session.scalar(query)
                if job_id is None:
                    return None
                if claim := _claim(session, job_id, worker_id, lease_seconds, offer):
                    return claim
        return None

    def overdue_job(self, seconds: float, worker_id: str, offer: Offer = ANYTHING) -> str | None:
        """The job whose turn it is, of those that this worker may take and the offer fits, if it
        has been queued for so long already; only looked at."""
        if not (wanted := offer.wanted):
            return None
        with self.read() as session:
            job_id = session.scalar(next_queued(wanted, worker_id))
            waiting = select(JobRow.id).where(JobRow.id == job_id)
            return session.scalar(waiting.where(long_ago(JobRow.queued_at, seconds)))


def _claim(
    session: Session, job_id: str, worker_id: str, lease_seconds: float, offer: Offer
) -> Claim | None:
    locked = select(JobRow).where(
        JobRow.id == job_id, JobRow.status == "queued", may_go_to(worker_id, JobRow)
    )
    job = session.scalar(locked.with_for_update().execution_options(populate_existing=True))
    if job is None:
        return None
    gpus = offer.takes(job.queue)
    if gpus is None or not _admitted(session, job.project_id, gpus):
        return None
    now = datetime.now(UTC)
    take = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == "queued")
        .values(
            status="running",
            not_before=None,
            attempt=JobRow.attempt + 1,
            worker_id=worker_id,
            claimed_at=epoch_now(),
            lease_expires_at=epoch_now() + lease_seconds,
            gpus_held=gpus,
            started_at=func.coalesce(JobRow.started_at, now),
        )
        .returning(JobRow.attempt)
    )
    attempt = session.scalars(take).one()
    served = update(ProjectRow).where(ProjectRow.id == job.project_id)
    session.execute(served.values(served_at=epoch_now()))
    job = session.get_one(JobRow, job_id, populate_existing=True)
    session.add(
        AttemptRow(job_id=job_id, attempt=attempt, worker_id=worker_id, started_at=now, gpus=gpus)
    )
    forget_messages(session, [job_id])
    return Claim(job, attempt, gpus)


def _admitted(session: Session, project_id: str, gpus: int) -> bool:
    """Do the project's quotas allow one more job? From here to the end of the transaction nobody
    else can claim one of it."""
    mine = ProjectRow.id == project_id
    session.execute(select(ProjectRow.id).where(mine).with_for_update())  # counted is under it
    busy = under_way()
    jobs, seconds = func.coalesce(busy.c.jobs, 0), func.coalesce(busy.c.gpu_seconds, 0.0)
    query = (
        select(has_room(jobs), has_gpu_hours(seconds))
        .select_from(ProjectRow)
        .outerjoin(busy, busy.c.project_id == ProjectRow.id)
        .where(mine)
    )
    found = session.execute(query).one_or_none()
    return found is not None and bool(found[0]) and (gpus == 0 or bool(found[1]))
