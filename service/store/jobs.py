"""Jobs as their owners see them: create, look at, cancel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from bridge_engine.spec import JobSpec
from service.store.database import Database, clean
from service.store.errors import Conflict, NotFound
from service.store.ids import new_id
from service.store.models import AttemptRow, JobRow, OutboxRow


class Jobs(Database):
    """The part of the store that the API works with."""

    def create_job(
        self, spec: JobSpec, *, total_steps: int, idempotency_key: str | None = None
    ) -> tuple[JobRow, bool]:
        """Queues a job and the message about it, in one transaction.

        With an idempotency key that was used before, returns the job it made and False; raises
        Conflict (`idempotency_key_reused`) if that was made from another spec.
        """
        content = clean(spec.model_dump(mode="json", by_alias=True))
        digest = _digest(content)
        if idempotency_key is not None and (first := self._same_request(idempotency_key, digest)):
            return first, False
        now = datetime.now(UTC)
        job = JobRow(
            id=new_id("job"),
            kind=spec.kind,
            name=clean(spec.name),
            method=spec.method.name,
            model=spec.model,
            status="queued",
            wanted="run",
            spec=content,
            error=None,
            result=None,
            latest={},
            attempt=0,
            lost_attempts=0,
            worker_id=None,
            lease_expires_at=None,
            progress_step=0,
            total_steps=total_steps,
            best_step=None,
            checkpoint_step=None,
            created_at=now,
            queued_at=now,
            started_at=None,
            finished_at=None,
            deleted_at=None,
            idempotency_key=idempotency_key,
            idempotency_hash=digest if idempotency_key is not None else None,
        )
        try:
            with self.write() as session:
                session.add(job)
                session.flush()
                session.add(OutboxRow(job_id=job.id, created_at=now))
        except IntegrityError:
            # Lost a race for the same key; whoever won made the job.
            if idempotency_key is None:
                raise
            first = self._same_request(idempotency_key, digest)
            if first is None:
                raise
            return first, False
        return job, True

    def _same_request(self, key: str, digest: str) -> JobRow | None:
        with self.read() as session:
            job = session.scalar(select(JobRow).where(JobRow.idempotency_key == key))
        if job is not None and job.idempotency_hash != digest:
            raise Conflict(
                f"the idempotency key {key!r} was used for job {job.id} with another spec; use a "
                "new key for a new job",
                code="idempotency_key_reused",
            )
        return job

    def get_job(self, job_id: str) -> JobRow:
        """The job; raises NotFound."""
        with self.read() as session:
            return found(session, job_id)

    def list_jobs(
        self,
        after: str | None = None,
        limit: int = 20,
        status: str | None = None,
        method: str | None = None,
        name: str | None = None,
    ) -> tuple[list[JobRow], bool]:
        """Jobs, newest first, and whether there are more.

        `after` is the id of the last job of the page before; jobs that come in meanwhile do not
        move the pages.
        """
        query = select(JobRow).where(JobRow.deleted_at.is_(None))
        query = query.order_by(JobRow.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(JobRow.id < after)
        if status is not None:
            query = query.where(JobRow.status == status)
        if method is not None:
            query = query.where(JobRow.method == method)
        if name is not None:
            query = query.where(JobRow.name == name)
        with self.read() as session:
            jobs = session.scalars(query).all()
        return list(jobs[:limit]), len(jobs) > limit

    def request_cancel(self, job_id: str) -> JobRow:
        """Wants the job to stop. A queued job is cancelled at once, a running one as soon as its
        engine has saved; one that ended stays as it is. Asking twice is the same as once."""
        with self.write() as session:
            job = found(session, job_id, lock=True)
            if job.status == "queued":
                job.status, job.wanted = "cancelled", "cancel"
                job.finished_at = datetime.now(UTC)
                forget_messages(session, [job_id])
            elif job.status == "running":
                job.status, job.wanted = "cancelling", "cancel"
            return job

    def attempts(self, job_id: str) -> list[AttemptRow]:
        """Every try at the job, in order; raises NotFound."""
        with self.read() as session:
            found(session, job_id)
            query = select(AttemptRow).where(AttemptRow.job_id == job_id)
            return list(session.scalars(query.order_by(AttemptRow.attempt)))

    def count_jobs(self) -> dict[str, int]:
        """Number of jobs by status."""
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        query = query.where(JobRow.deleted_at.is_(None))
        with self.read() as session:
            return dict(session.execute(query).all())


def found(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """The job's row, locked for this transaction if so wanted; raises NotFound."""
    query = select(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_(None))
    job = session.scalar(query.with_for_update() if lock else query)
    if job is None:
        raise NotFound("job", job_id)
    return job


def forget_messages(session: Session, job_ids: Sequence[str]) -> None:
    """Deletes the jobs' messages: they have been understood, or nobody needs to hear them."""
    session.execute(delete(OutboxRow).where(OutboxRow.job_id.in_(job_ids)))


def _digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
