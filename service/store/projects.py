"""Projects and their quotas, live workers, and what a queued job waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache

from sqlalchemy import Select, and_, bindparam, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.store.database import Database, clean, epoch_now, upsert
from service.store.errors import Conflict, NotFound
from service.store.ids import new_id
from service.store.models import AttemptRow, JobRow, ProjectRow, WorkerRow
from service.store.queues import NEEDS, Offer, under_way

KEPT_SECONDS = 600.0
"""A worker that has been silent for so much longer than it promised is forgotten."""


class Projects(Database):
    """The part of the store that knows whose jobs there are and who serves them."""

    def create_project(
        self,
        name: str,
        *,
        project_id: str | None = None,
        max_running: int | None = None,
        gpu_hours: float | None = None,
    ) -> ProjectRow:
        """Raises Conflict (`project_exists`) if the id is taken."""
        project = ProjectRow(
            id=project_id or new_id("proj"),
            name=clean(name),
            max_running=max_running,
            gpu_hours=gpu_hours,
            gpu_seconds_used=0.0,
            served_at=None,
            created_at=datetime.now(UTC),
        )
        try:
            with self.write() as session:
                session.add(project)
        except IntegrityError:
            raise Conflict(
                f"there is a project {project_id!r} already; change that one, or take another id",
                code="project_exists",
            ) from None
        return project

    def project(self, project_id: str) -> ProjectRow:
        """Raises NotFound."""
        with self.read() as session:
            return found_project(session, project_id)

    def projects(self) -> list[ProjectRow]:
        """All of them, by id."""
        with self.read() as session:
            return list(session.scalars(select(ProjectRow).order_by(ProjectRow.id)))

    def update_project(
        self, project_id: str, *, name: str, max_running: int | None, gpu_hours: float | None
    ) -> ProjectRow:
        """Gives a project this name and these quotas. Jobs that run go on; raises NotFound."""
        with self.write() as session:
            project = found_project(session, project_id, lock=True)
            project.name, project.max_running = clean(name), max_running
            project.gpu_hours = gpu_hours
            return project

    # ------------------------------------------------------------------ live workers

    def announce_worker(
        self, worker_id: str, queues: Sequence[str], *, gpus: int, slots: int, seconds: float
    ) -> None:
        """This worker lives and serves these queues; believed for so many seconds."""
        with self.write() as session:
            row = {"id": worker_id, "queues": list(queues), "gpus": gpus, "slots": slots}
            expires = session.scalar(select(epoch_now())) or 0.0
            upsert(session, WorkerRow, [{**row, "expires_at": expires + seconds}])
            long_gone = WorkerRow.expires_at < expires - KEPT_SECONDS
            session.execute(delete(WorkerRow).where(long_gone))

    def retire_worker(self, worker_id: str) -> None:
        """This worker serves nothing any more."""
        with self.write() as session:
            session.execute(delete(WorkerRow).where(WorkerRow.id == worker_id))

    def live_workers(self) -> list[WorkerRow]:
        """Those that were heard of in time, by id."""
        with self.read() as session:
            return _live_workers(session)

    def waiting_for(self, jobs: Iterable[JobRow]) -> dict[str, str]:
        """By the id of each job that is queued: what it waits for, in words."""
        queued = [job for job in jobs if job.status == "queued"]
        if not queued:
            return {}
        of_jobs = {"ids": list({job.project_id for job in queued})}
        with self.read() as session:
            workers = _live_workers(session)
            projects = {row[0].id: row for row in session.execute(_busy_projects(), of_jobs)}
            backing_off = _backing_off(session, [job.id for job in queued if job.retry_at])
        waiting = {}
        for job in queued:
            project, jobs_now, seconds_now = projects.get(job.project_id) or (None, 0, 0.0)
            waiting[job.id] = (
                _no_worker(job.queue, workers)
                or backing_off.get(job.id)
                or (project and _quota(project, job.queue, jobs_now, seconds_now, workers))
                or "a free worker"
            )
        return waiting


def _live_workers(session: Session) -> list[WorkerRow]:
    return list(session.scalars(_ALIVE))


_ALIVE = select(WorkerRow).where(WorkerRow.expires_at >= epoch_now()).order_by(WorkerRow.id)


@cache  # every job that is shown asks, and putting it together takes as long as the answer
def _busy_projects() -> Select[ProjectRow, int, float]:
    """The projects of these `ids`, each with the jobs it has under way and their GPU seconds."""
    busy = under_way()
    jobs, seconds = func.coalesce(busy.c.jobs, 0), func.coalesce(busy.c.gpu_seconds, 0.0)
    query = select(ProjectRow, jobs, seconds)
    query = query.outerjoin(busy, busy.c.project_id == ProjectRow.id)
    return query.where(ProjectRow.id.in_(bindparam("ids", expanding=True)))


def _backing_off(session: Session, ids: Sequence[str]) -> dict[str, str]:
    """By the id of each of these jobs whose time has not come: until when and why it waits."""
    if not ids:
        return {}
    last = and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt)
    query = select(JobRow, AttemptRow.error).join(AttemptRow, last)
    found = session.execute(query.where(JobRow.id.in_(ids), JobRow.not_before > epoch_now()))
    return {
        job.id: f"its next try at {job.retry_at:%H:%M:%S} UTC, "
        f"as attempt {job.attempt} broke down: {(error or {}).get('message')}"
        for job, error in found
    }


def _no_worker(queue: str, workers: Sequence[WorkerRow]) -> str | None:
    if not workers:
        return "a worker: none is running"
    if any(_offer(worker).takes(queue) is not None for worker in workers):
        return None
    need = NEEDS.get(queue) or 0
    what = {0: "", 1: " with a GPU"}.get(need, f" with {need} GPUs")
    return f"a worker{what} that serves the queue {queue}"


def _quota(
    project: ProjectRow, queue: str, jobs: int, seconds: float, workers: Sequence[WorkerRow]
) -> str | None:
    if project.max_running is not None and jobs >= project.max_running:
        many = (
            "1 running job" if project.max_running == 1 else f"{project.max_running} running jobs"
        )
        return f"the project's quota of {many}"
    used = (project.gpu_seconds_used + seconds) / 3600
    takes = [_offer(worker).takes(queue) for worker in workers]
    if project.gpu_hours is not None and used >= project.gpu_hours and 0 not in takes:
        return f"the project's quota of {project.gpu_hours:g} GPU hours, which are used up"
    return None


def _offer(worker: WorkerRow) -> Offer:
    """What it could give a job if nothing else ran."""
    return Offer(tuple(worker.queues), worker.gpus, worker.gpus)


def found_project(session: Session, project_id: str, *, lock: bool = False) -> ProjectRow:
    """The project's row; raises NotFound."""
    query = select(ProjectRow).where(ProjectRow.id == project_id)
    project = session.scalar(query.with_for_update() if lock else query)
    if project is None:
        raise NotFound(
            "project", project_id, f"there is no project {project_id!r}; see GET /projects"
        )
    return project
