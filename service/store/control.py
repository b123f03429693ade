"""What its owner can ask of a job: pause, resume, cancel, retry; and how soon it should run."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.store.database import Database
from service.store.errors import Conflict
from service.store.jobs import found
from service.store.models import EventRow, JobRow
from service.store.outbox import announce, forget_messages
from service.store.status import REQUESTS, WANTED, Request, possible

_DONE = {"pause": "paused", "resume": "resumed", "cancel": "cancelled", "retry": "retried"}


class Control(Database):
    """The part of the store that steers jobs."""

    def request(self, job_id: str, request: Request) -> JobRow:
        """Does what `status.REQUESTS` says; asking twice is the same as once.

        A job that no worker holds changes at once; from one that runs, its worker is told, and the
        status says that it is on its way. Raises NotFound, and Conflict (`cannot_pause`, …) with
        what is possible instead.
        """
        with self.write() as session:
            job = found(session, job_id, lock=True)
            before = job.status
            after = REQUESTS[request].get(before)  # type: ignore[call-overload]
            if request == "retry" and job.retries and before in ("queued", "running"):
                after = before  # it is being retried
            if after is None:
                raise _refusal(job, request)
            if WANTED[request] == "run":
                job.not_before = None  # whoever asks does not want to wait
            if after == before:
                return job
            job.status, job.wanted = after, WANTED[request]
            if after == "queued":
                _queue(session, job)
            if before == "queued":
                forget_messages(session, [job_id])
            if request == "retry":
                _forget_end(session, job)
            if after == "cancelled":
                job.finished_at = datetime.now(UTC)
            return job

    def request_cancel(self, job_id: str) -> JobRow:
        """Wants the job to stop. A queued job is cancelled at once, a running one as soon as its
        engine has saved; one that ended stays as it is."""
        return self.request(job_id, "cancel")

    def set_priority(self, job_id: str, priority: int) -> JobRow:
        """Changes how soon the job's turn comes. Raises NotFound, and Conflict (`not_waiting`) if
        it does not wait for its turn."""
        with self.write() as session:
            job = found(session, job_id, lock=True)
            if job.priority != priority and job.status not in ("queued", "paused"):
                raise Conflict(
                    f"job {job.id} is {job.status}: its priority counts while it waits in the "
                    "queue, and it does not",
                    code="not_waiting",
                    allowed=possible(job.status),  # type: ignore[arg-type]
                )
            job.priority = priority
            return job


def _queue(session: Session, job: JobRow) -> None:
    job.queued_at = datetime.now(UTC)
    announce(session, job.id)


def _forget_end(session: Session, job: JobRow) -> None:
    """The job is as if it had not ended, and what its run said of its end is void."""
    last = select(func.max(EventRow.seq)).where(EventRow.job_id == job.id)
    job.retried_seq = session.scalar(last) or 0
    job.retries += 1
    job.lost_attempts = 0
    job.error, job.result, job.finished_at = None, None, None


def _refusal(job: JobRow, request: Request) -> Conflict:
    instead = possible(job.status)  # type: ignore[arg-type]
    *others, last = instead
    words = f"{', '.join(others)} or {last}" if others else last
    return Conflict(
        f"job {job.id} is {job.status} and cannot be {_DONE[request]}; possible now: {words}",
        code=f"cannot_{request}",
        allowed=instead,
    )
