"""What the API says about jobs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from bridge_engine.errors import Category
from service.jobs.estimate import Estimates
from service.store.models import AttemptRow, CheckpointRow, JobRow, SampleRow
from service.store.status import Status, Wanted


class Answer(BaseModel):
    """Base of all answers; attribute docstrings become the schema's descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)


class JobError(Answer):
    """Why a job failed."""

    category: Category
    code: str
    """A stable snake_case word."""
    message: str
    """What went wrong, where, and what to do about it."""
    param: str | None = None
    """Dotted path of the spec's field at fault."""
    retryable: bool = False
    """Can the same job succeed when it is simply run again?"""


class ForkedFrom(Answer):
    """Where a job comes from."""

    job: str
    step: int | None
    """null: it was made from that job's spec alone."""


class Job(Answer):
    """A job and where it stands. Times are UTC."""

    id: str
    object: Literal["job"] = "job"
    kind: str
    """`train` or `eval`."""
    name: str | None
    method: str
    """The method of training; `eval` for an evaluation."""
    model: str
    status: Status
    wanted: Wanted
    """What its owner wants of it."""
    project: str
    queue: str
    """What a worker must have to run it: any, cpu, gpu or gpu:N."""
    priority: int
    """-100…100; higher ones are started first."""
    waiting_for: str | None
    """Of a queued job: what it waits for, in words."""
    retry_at: datetime | None
    """Of a queued job that broke down: when it is tried again at the earliest; why, `waiting_for`
    says, and the last of its attempts."""
    forked_from: ForkedFrom | None
    """The job it was made from, and the step of the checkpoint it started from."""
    attempt: int
    """How often a worker has started it."""
    retries: int
    """How often its owner has had it tried again after its end."""
    step: int
    """Finished optimisation steps; of an evaluation, problems."""
    steps: int
    """Steps of the whole job; 0 while the data alone knows."""
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: dict[str, Any]
    """The spec with every default filled in."""
    error: JobError | None
    result: dict[str, Any] | None
    """accuracy_before, accuracy_after, their 95 % intervals, best_step, … of a finished training
    job; of an evaluation, what GET /jobs/{id}/scores shows."""
    adapter: str | None
    """The name /generate takes: the best checkpoint's adapter, else the newest, else null."""
    latest: dict[str, float | None]
    """The last value of each metric."""

    @classmethod
    def of(cls, row: JobRow, waiting_for: str | None = None) -> Job:
        """The row as the API shows it."""
        lineage = {"job": row.forked_from, "step": row.forked_step} if row.forked_from else None
        return cls.model_validate(
            {
                **{name: getattr(row, name) for name in _SAME},
                "project": row.project_id,
                "waiting_for": waiting_for,
                "retry_at": row.retry_at,
                "forked_from": lineage,
                "step": row.progress_step,
                "steps": row.total_steps,
            }
        )


_OWN = ("object", "step", "steps", "project", "waiting_for", "retry_at", "forked_from")
_SAME = [name for name in Job.model_fields if name not in _OWN]


class JobList(Answer):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    next: str | None
    """What to pass as `after` for the next page; null on the last one."""


class DryRun(Answer):
    """What a spec would become if it were submitted. Nothing was queued."""

    object: Literal["dry_run"] = "dry_run"
    spec: dict[str, Any]
    estimates: Estimates
    warnings: list[str]
    """What would not keep it from running, and should be known: an evaluation asks the adapter
    problems that it was trained on."""


class Metrics(Answer):
    """The figures of a job by name."""

    job_id: str
    metrics: dict[str, list[tuple[int, float | None]]]
    """[step, value] pairs, steps rising; null stands for a figure that was not a number."""


class Sample(Answer):
    """One completion the policy wrote."""

    id: int
    step: int
    source: str
    """`rollout` or `eval`."""
    problem: str
    completion: str
    gold: str
    reward: float | None
    """1 right, 0 wrong, null unjudged."""

    @classmethod
    def of(cls, row: SampleRow) -> Sample:
        return cls.model_validate(row)


class SampleList(Answer):
    """One page of completions, newest step first."""

    object: Literal["list"] = "list"
    data: list[Sample]
    has_more: bool
    next: str | None
    """What to pass as `after` for the next page; null on the last one."""


class Checkpoint(Answer):
    """A saved state of a job and the adapter exported from it."""

    step: int
    path: str
    """Resumable state, relative to the run directory; old ones are deleted as new ones come."""
    adapter: str | None
    """The adapter's name, JOB@STEP; null for a full student that exports none."""
    sha256: str
    """Of the adapter's weights; empty where there is none."""
    rank: int
    accuracy: float | None
    """Held-out accuracy in 0…1, where it was measured."""
    best: bool
    """The best of the job so far."""
    created_at: datetime

    @classmethod
    def of(cls, row: CheckpointRow) -> Checkpoint:
        same = {field: getattr(row, field) for field in cls.model_fields if field != "adapter"}
        name = f"{row.job_id}@{row.step}" if row.adapter else None
        return cls.model_validate({**same, "adapter": name})


class CheckpointList(Answer):
    """The checkpoints of a job, steps rising."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: bool = False
    next: str | None = None


class Attempt(Answer):
    """One worker's try at a job."""

    attempt: int
    worker_id: str
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    """succeeded, failed, cancelled, paused, released (handed back) or lost; null while it runs."""
    gpus: int
    """GPUs it was given."""
    error: dict[str, Any] | None

    @classmethod
    def of(cls, row: AttemptRow) -> Attempt:
        return cls.model_validate(row)


class AttemptList(Answer):
    """Every try at a job, in order."""

    object: Literal["list"] = "list"
    data: list[Attempt]
    has_more: bool = False
    next: str | None = None
