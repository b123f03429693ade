"""Jobs as their owners see them: create, look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from bridge_engine.spec.job import JobSpec
from service.store.artifacts import Artifact, keep_artifacts, named_now
from service.store.database import Database, clean
from service.store.errors import Conflict, NotFound
from service.store.ids import nearest_id, new_id
from service.store.models import DEFAULT_PROJECT, AttemptRow, JobRow
from service.store.outbox import announce
from service.store.projects import found_project
from service.store.queues import queue_of

EVALUATION = "eval"
"""What the `method` column says of evaluations, which its index finds."""
_SUGGESTED_FROM = 200
"""So many of the newest jobs are looked at for one whose id is like the given one."""


class Jobs(Database):
    """The part of the store that the API works with."""

    def create_job(
        self,
        spec: JobSpec,
        *,
        total_steps: int,
        idempotency_key: str | None = None,
        job_id: str | None = None,
        project_id: str = DEFAULT_PROJECT,
        priority: int = 0,
        forked_from: tuple[str, int | None] | None = None,
        request: object = None,
        artifacts: Sequence[Artifact] = (),
    ) -> tuple[JobRow, bool]:
        """Queues a job and the message about it, in one transaction.

        With an idempotency key that was used before, returns the job it made and False; raises
        Conflict (`idempotency_key_reused`) if that was made by another request: `request` (default:
        the spec). `job_id` is one that nobody has, `forked_from` a job and a step of it, and
        `artifacts` what was published for it. Raises NotFound if there is no such project.
        """
        content = clean(spec.model_dump(mode="json", by_alias=True))
        request = content if request is None else request
        if first := self.same_request(idempotency_key, request):
            return first, False
        now = datetime.now(UTC)
        job = JobRow(
            id=job_id or new_id("job"),
            kind=spec.kind,
            name=clean(spec.name),
            method=spec.method_name,
            model=spec.base,
            status="queued",
            wanted="run",
            project_id=project_id,
            queue=queue_of(spec.needs_gpus),
            priority=priority,
            spec=content,
            error=None,
            result=None,
            latest={},
            attempt=0,
            lost_attempts=0,
            not_before=None,
            worker_id=None,
            lease_expires_at=None,
            claimed_at=None,
            gpus_held=0,
            retries=0,
            retried_seq=0,
            forked_from=forked_from[0] if forked_from else None,
            forked_step=forked_from[1] if forked_from else None,
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
            idempotency_hash=_digest(request) if idempotency_key is not None else None,
        )
        try:
            with self.write() as session:
                if project_id != DEFAULT_PROJECT:  # which is always there
                    found_project(session, project_id)
                session.add(job)
                session.flush()
                keep_artifacts(session, job.id, artifacts)
                if artifacts:
                    named_now(session, [one.prefix for one in artifacts])
                announce(session, job.id)
        except IntegrityError:
            # Lost a race for the same key; whoever won made the job.
            if idempotency_key is None:
                raise
            first = self.same_request(idempotency_key, request)
            if first is None:
                raise
            return first, False
        return job, True

    def same_request(self, key: str | None, request: object) -> JobRow | None:
        """The job that a request with this idempotency key has made; None if there is none.

        Raises Conflict (`idempotency_key_reused`) if that was another request.
        """
        if key is None:
            return None
        with self.read() as session:
            job = session.scalar(select(JobRow).where(JobRow.idempotency_key == key))
        if job is not None and job.idempotency_hash != _digest(request):
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

    def nearest_job(self, job_id: str) -> str | None:
        """The job that may have been meant, of the newest."""
        query = select(JobRow.id).where(JobRow.deleted_at.is_(None))
        with self.read() as session:
            ids = session.scalars(query.order_by(JobRow.id.desc()).limit(_SUGGESTED_FROM))
            return nearest_id(job_id, ids.all())

    def list_jobs(
        self,
        after: str | None = None,
        limit: int = 20,
        status: str | None = None,
        method: str | None = None,
        name: str | None = None,
        project_id: str | None = None,
        kind: str | None = None,
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
        if project_id is not None:
            query = query.where(JobRow.project_id == project_id)
        if kind is not None:
            query = query.where(JobRow.kind == kind)
        with self.read() as session:
            jobs = session.scalars(query).all()
        return list(jobs[:limit]), len(jobs) > limit

    def evaluations_of(self, adapter: str, limit: int = 20) -> list[JobRow]:
        """The newest evaluations of an adapter, by its name for ever, that have succeeded."""
        query = select(JobRow).where(
            JobRow.deleted_at.is_(None),
            JobRow.method == EVALUATION,
            JobRow.status == "succeeded",
            JobRow.spec["adapter"].as_string() == adapter,
        )
        with self.read() as session:
            return list(session.scalars(query.order_by(JobRow.id.desc()).limit(limit)))

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


def _digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
