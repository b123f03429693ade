"""Which job is next: the queues, what a worker offers, and the one query that knows the order.

A queue is named after what its jobs need of a worker:

    any      nothing; one GPU where the worker has GPUs (`resources.gpus` left open)
    cpu      no GPU, and none is used
    gpu      one GPU
    gpu:N    N GPUs, 2…8

Next is the job of the highest priority; of these, that of the project with the fewest jobs under
way, then of the project that was served least recently; then the oldest. A project that has reached
`max_running` has none, nor one whose GPU hours are used up where the job would take a GPU. A job
that broke down is passed over until its time has come, and by a worker that had no room for it as
long as there are others to try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    Select,
    String,
    Subquery,
    and_,
    cast,
    func,
    literal,
    not_,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import aliased

from service.store.database import epoch_now
from service.store.models import AttemptRow, JobRow, OutboxRow, ProjectRow, WorkerRow
from service.store.status import OWNED

MOST_GPUS: Final = 8
NEEDS: Final[dict[str, int | None]] = {
    "any": None,
    "cpu": 0,
    "gpu": 1,
    **{f"gpu:{number}": number for number in range(2, MOST_GPUS + 1)},
}
"""Every queue, and the GPUs its jobs need. None: one where the worker has GPUs."""
QUEUES: Final = tuple(NEEDS)
NO_ROOM: Final = "disk_full"
"""The error's code of an attempt that failed for lack of room on its worker's disk."""


def queue_of(gpus: int | None) -> str:
    """The queue of a job that needs so many GPUs; None: it does not say."""
    return next(name for name, need in NEEDS.items() if need == gpus)


def served_by(gpus: int) -> tuple[str, ...]:
    """The queues that a worker with so many GPUs can serve."""
    return tuple(name for name, need in NEEDS.items() if (need or 0) <= gpus)


@dataclass(frozen=True)
class Offer:
    """What a worker can give a job now. By default: whatever the job needs."""

    queues: tuple[str, ...] = QUEUES
    """Those it serves."""
    gpus: int | None = None
    """GPUs it has; None: nobody counts them."""
    free: int | None = None
    """Of these, those that no job of its own holds."""

    def takes(self, queue: str) -> int | None:
        """GPUs that a job of this queue would be given; None if it cannot be taken (now)."""
        if queue not in self.queues or queue not in NEEDS:
            return None
        need = NEEDS[queue]
        if need is None:
            need = 1 if self.gpus else 0
        return need if self.gpus is None or need <= (self.free or 0) else None

    @property
    def wanted(self) -> dict[str, int]:
        """The queues it can take a job of now, and the GPUs that one would be given."""
        takes = {queue: self.takes(queue) for queue in self.queues}
        return {queue: gpus for queue, gpus in takes.items() if gpus is not None}


def under_way(*, told: bool = False) -> Subquery:
    """By project: `jobs` that workers hold, and `gpu_seconds` that these have used so far.

    `told` counts jobs whose message was sent as well: a worker may take them any moment.
    """
    held = JobRow.gpus_held * (epoch_now() - JobRow.claimed_at)
    running = select(JobRow.project_id, held.label("used")).where(JobRow.status.in_(OWNED))
    rows: Any = running
    if told:
        sent = (
            select(JobRow.project_id, literal(0.0).label("used"))
            .join(OutboxRow, OutboxRow.job_id == JobRow.id)
            .where(OutboxRow.sent_at.is_not(None))
        )
        rows = union_all(running, sent)
    each = rows.subquery()
    return (
        select(
            each.c.project_id,
            func.count().label("jobs"),
            func.coalesce(func.sum(each.c.used), 0.0).label("gpu_seconds"),
        )
        .group_by(each.c.project_id)
        .subquery()
    )


def has_room(jobs: ColumnElement[int]) -> ColumnElement[bool]:
    """May the project run one more job beside these?"""
    return or_(ProjectRow.max_running.is_(None), jobs < ProjectRow.max_running)


def has_gpu_hours(running_seconds: ColumnElement[float]) -> ColumnElement[bool]:
    """Is anything left of the project's GPU hours?"""
    used = ProjectRow.gpu_seconds_used + running_seconds
    return or_(ProjectRow.gpu_hours.is_(None), used < ProjectRow.gpu_hours * 3600)


def presence_of(worker_id: str) -> str:
    """The name that a worker is known by (`WorkerRow.id`), of that which a job carries, which has
    the slot's besides."""
    return worker_id.rpartition(":")[0] or worker_id


def may_go_to(worker_id: str | None, job: Any) -> ColumnElement[bool]:
    """Has the job's time come, and has this worker room for it as far as is known? One that had
    none is asked again where no other is left that lives, serves the queue and had some."""
    rested = or_(job.not_before.is_(None), job.not_before <= epoch_now())
    if worker_id is None:
        return rested
    me = presence_of(worker_id)
    lacking = _without_room(job, literal(me))
    other = select(WorkerRow.id).where(
        WorkerRow.expires_at >= epoch_now(),
        WorkerRow.id != me,
        cast(WorkerRow.queues, String).contains(literal('"') + job.queue + literal('"')),
        not_(_without_room(job, WorkerRow.id)),
    )
    # most jobs never broke down: nothing is looked up for them
    rather_elsewhere = and_(job.lost_attempts > 0, lacking, other.correlate(job).exists())
    return and_(rested, not_(rather_elsewhere))


def _without_room(job: Any, worker: Any) -> ColumnElement[bool]:
    """Did the job break down at this worker's for lack of room, since its last checkpoint?"""
    tried = aliased(AttemptRow)
    return (
        select(tried.job_id)
        .where(
            tried.job_id == job.id,
            tried.attempt > job.attempt - job.lost_attempts,
            tried.worker_id.startswith(worker + ":"),
            tried.error["code"].as_string() == NO_ROOM,
        )
        .correlate(job, WorkerRow)
        .exists()
    )


def next_queued(
    queues: Mapping[str, int], worker_id: str | None = None, *, unsent: bool = False
) -> Select[str]:
    """The id of the next job of these queues, which maps each to the GPUs a job would be given.

    `worker_id`: of those that this worker may take.
    `unsent`: of those whose message has yet to be sent; jobs whose message was sent then count as
    under way. Costs what projects × queues cost, however many jobs wait.
    """
    return _next_queued(tuple(queues.items()), worker_id, unsent)


@lru_cache(maxsize=256)  # workers ask several times a second, and putting it together takes longer
def _next_queued(
    queues: tuple[tuple[str, int], ...], worker_id: str | None, unsent: bool
) -> Select[str]:
    busy = under_way(told=unsent)
    jobs = func.coalesce(busy.c.jobs, 0)
    seconds = func.coalesce(busy.c.gpu_seconds, 0.0)
    candidates = union_all(
        *(
            select(
                ProjectRow.id.label("project_id"), _first(queue, worker_id, unsent).label("job_id")
            )
            .select_from(ProjectRow)
            .outerjoin(busy, busy.c.project_id == ProjectRow.id)
            .where(has_room(jobs), has_gpu_hours(seconds) if gpus else literal(True))
            for queue, gpus in queues
        )
    ).subquery()
    return (
        select(JobRow.id)
        .join(candidates, candidates.c.job_id == JobRow.id)
        .join(ProjectRow, ProjectRow.id == JobRow.project_id)
        .outerjoin(busy, busy.c.project_id == JobRow.project_id)
        .order_by(JobRow.priority.desc(), jobs, func.coalesce(ProjectRow.served_at, 0.0), JobRow.id)
        .limit(1)
    )


def _first(queue: str, worker_id: str | None, unsent: bool) -> ScalarSelect[str | None]:
    """The project's oldest job of the highest priority in this queue. Both are found at one end of
    the index, and with a LIMIT the search ends at the first row that will do."""
    job, top = aliased(JobRow), aliased(JobRow)
    highest = (
        select(top.priority)
        .where(_waits(top, queue, worker_id, unsent))
        .order_by(top.priority.desc())
        .limit(1)
        .correlate(ProjectRow)
        .scalar_subquery()
    )
    return (
        select(job.id)
        .where(_waits(job, queue, worker_id, unsent), job.priority == highest)
        .order_by(job.id)
        .limit(1)
        .correlate(ProjectRow)
        .scalar_subquery()
    )


def _waits(job: Any, queue: str, worker_id: str | None, unsent: bool) -> ColumnElement[bool]:
    waits = and_(
        job.project_id == ProjectRow.id,
        job.queue == queue,
        job.status == "queued",
        may_go_to(worker_id, job),
    )
    if not unsent:
        return waits
    message = select(OutboxRow.id).where(
        OutboxRow.job_id == job.id,
        OutboxRow.sent_at.is_(None),
        or_(OutboxRow.not_before.is_(None), OutboxRow.not_before <= epoch_now()),
    )
    return and_(waits, message.exists())
