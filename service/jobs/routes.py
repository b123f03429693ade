"""The routes under /jobs that submit and read; those that steer are in `control`."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse

from bridge_engine.spec.train import TrainSpec
from service.artifacts import ArtifactsUnavailable
from service.artifacts.removal import remove
from service.body import read_body, read_object
from service.context import LARGEST_INT, TEXT, ProjectDep, SettingsDep, StoreDep
from service.errors import ApiError, responses
from service.jobs import events, figures, initial, submit
from service.jobs.logs import tail as last_lines
from service.jobs.schemas import (
    Attempt,
    AttemptList,
    Checkpoint,
    CheckpointList,
    DryRun,
    Job,
    JobList,
    Metrics,
    Sample,
    SampleList,
)
from service.parameters import check_cursor, unknown_cursor
from service.store import NotFound, Store
from service.store.models import DEFAULT_PROJECT, JobRow
from service.store.status import Status

log = logging.getLogger(__name__)

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, Path(description="The job's id, `job_…`.")]
Step = Annotated[int | None, Query(ge=0, le=LARGEST_INT, description="Of this step alone.")]
Body = Annotated[tuple[bytes, str], Depends(read_body)]


def _id(job_id: JobId) -> str:
    """The id as the database can be asked for it: Postgres takes no NUL, for one."""
    if not job_id.isascii() or not job_id.isprintable():
        raise NotFound("job", job_id)
    return job_id


Id = Annotated[str, Depends(_id)]


def _existing(job_id: Id, store: StoreDep) -> JobRow:
    return store.get_job(job_id)


def _resume_point(
    after: Annotated[
        int, Query(ge=0, le=LARGEST_INT, description="Only events with a greater seq.")
    ] = 0,
    last_event_id: Annotated[
        str | None, Header(description="As EventSource sends it; goes before `after`.")
    ] = None,
) -> int:
    if last_event_id is None or not last_event_id.strip():
        return after
    if not re.fullmatch(r"[0-9]{1,18}", last_event_id.strip()):
        raise ApiError(
            422,
            "invalid_last_event_id",
            f"Last-Event-ID is the id of an event of this stream, a whole number; it is "
            f"{last_event_id!r}",
            param="Last-Event-ID",
            given=last_event_id,
        )
    return int(last_event_id)


def shown(store: Store, row: JobRow) -> Job:
    """The job as the API shows it, with what it waits for."""
    return Job.of(row, store.waiting_for([row]).get(row.id))


def announced(store: Store, response: Response, row: JobRow, created: bool) -> Job:
    """The answer about a job that was asked for: where it is, and whether it was there already."""
    response.headers["Location"] = f"/jobs/{row.id}"
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return shown(store, row)


ExistingJob = Annotated[JobRow, Depends(_existing)]
ResumePoint = Annotated[int, Depends(_resume_point)]


def _spec_body() -> dict[str, object]:
    kinds = {"train": "TrainSpec", "eval": "EvaluationSpec"}
    schema = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in kinds.values()]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "examples": submit.EXAMPLES},
                "application/yaml": {"schema": schema},
            },
        }
    }


@router.post(
    "",
    operation_id="create_job",
    summary="Submit a job",
    status_code=201,
    response_model=Job | DryRun,
    responses={
        200: {"model": DryRun, "description": "dry_run: what the spec would become."},
        **responses(400, 409, 413, 415, 422),
    },
    openapi_extra=_spec_body(),
)
def create_job(
    body: Body,
    store: StoreDep,
    settings: SettingsDep,
    response: Response,
    dry_run: Annotated[
        bool, Query(description="Answer the resolved spec and estimates; queue nothing.")
    ] = False,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Sent again with the same spec, it answers the job it made the first time.",
        ),
    ] = None,
    priority: Annotated[
        int, Query(ge=-100, le=100, description="Jobs of a higher one are started first.")
    ] = 0,
    project: ProjectDep = None,
) -> Job | DryRun:
    """Validates the spec, fills every default and queues the job: of training, or with `kind: eval`
    of evaluation.

    The body is JSON or YAML. A spec that cannot run is refused with every field at fault.
    """
    spec = submit.asked_for(read_object(body, allow_yaml=True))
    if dry_run:
        response.status_code = 200
        spec, warnings = submit.resolved(spec, store, settings)
        if isinstance(spec, TrainSpec) and spec.init is not None:
            spec, _ = initial.resolve(spec, store, settings)
        dumped = spec.model_dump(mode="json", by_alias=True)
        return DryRun(spec=dumped, estimates=submit.estimated(spec, store), warnings=warnings)
    row, created = submit.create(
        spec,
        store,
        settings,
        idempotency_key=idempotency_key,
        project_id=project or DEFAULT_PROJECT,
        priority=priority,
    )
    return announced(store, response, row, created)


@router.get("", operation_id="list_jobs", summary="List jobs", responses=responses(404, 422))
def list_jobs(
    store: StoreDep,
    after: Annotated[
        str | None,
        Query(pattern=TEXT, description="Go on after this job: the `next` of the page before."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
    status: Status | None = None,
    kind: Literal["train", "eval"] | None = None,
    method: Annotated[str | None, Query(pattern=TEXT)] = None,
    name: Annotated[str | None, Query(pattern=TEXT)] = None,
    project: ProjectDep = None,
) -> JobList:
    """Jobs, newest first; of one project, if the header names it. New jobs do not move the pages of
    a listing that has begun."""
    check_cursor(store.get_job, after)
    rows, more = store.list_jobs(after, limit, status, method, name, project, kind)
    following = rows[-1].id if more else None
    waiting = store.waiting_for(rows)
    data = [Job.of(row, waiting.get(row.id)) for row in rows]
    return JobList(data=data, has_more=more, next=following)


@router.get("/{job_id}", operation_id="get_job", summary="One job", responses=responses(404))
def get_job(job: ExistingJob, store: StoreDep) -> Job:
    """The job as it is now."""
    return shown(store, job)


@router.delete(
    "/{job_id}",
    operation_id="delete_job",
    summary="Delete",
    status_code=204,
    response_class=Response,
    responses={
        202: {
            "description": "It is gone for everybody; its files follow when they can be reached."
        },
        **responses(404, 409),
    },
)
def delete_job(job_id: Id, store: StoreDep, settings: SettingsDep, request: Request) -> Response:
    """Deletes a job that has ended, with all it left: figures, samples, checkpoints, adapters.

    It is gone for everybody at once. Asked again before the last of it is removed, it goes on.
    """
    store.mark_deleted(job_id)
    request.app.state.controller.changed()  # its adapters answer nobody any more
    try:
        remove(job_id, store, settings)
    except (ArtifactsUnavailable, OSError) as error:
        log.warning("job %s is deleted, what it left follows later: %s", job_id, error)
        return Response(status_code=202)
    return Response(status_code=204)


@router.get(
    "/{job_id}/metrics", operation_id="get_metrics", summary="Metrics", responses=responses(404)
)
def get_metrics(
    job: ExistingJob,
    store: StoreDep,
    keys: Annotated[
        list[str] | None,
        Query(description="Names of metrics, repeated or separated by commas; default: all."),
    ] = None,
    after_step: Annotated[
        int | None, Query(ge=-1, le=LARGEST_INT, description="Only later steps.")
    ] = None,
    max_points: Annotated[
        int | None,
        Query(ge=4, le=100_000, description="Thin each series, keeping its lows and highs."),
    ] = None,
) -> Metrics:
    """Series of [step, value], one a metric. A name that the job has no figures of (yet) is left
    out; one that it cannot have any more, or that no job has, is refused."""
    names = [name for part in keys or [] for name in part.split(",") if name]
    series = store.metrics(job.id, keys=names or None, after_step=after_step, max_points=max_points)
    figures.check_names([name for name in names if name not in series], job)
    return Metrics(job_id=job.id, metrics=series)


@router.get(
    "/{job_id}/events",
    operation_id="follow_events",
    summary="Follow a job",
    response_class=events.EventStream,
    responses=responses(404, 422),
)
async def follow_events(
    request: Request,
    job: ExistingJob,
    store: StoreDep,
    after: ResumePoint,
) -> Response:
    """Server-sent events: `id` is the event's seq, `event` its type, `data` the event as JSON.

    What has happened comes first, then what happens. After the job's last event comes `end` with
    the job's status, and the stream is closed. Each event comes exactly once.
    """
    state = request.app.state
    stream = events.follow(state.feeds, store, job.id, after, state.stopping)
    return events.EventStream(stream)


@router.get(
    "/{job_id}/samples", operation_id="list_samples", summary="Samples", responses=responses(404)
)
def list_samples(
    job: ExistingJob,
    store: StoreDep,
    step: Step = None,
    after: Annotated[
        str | None,
        Query(pattern=TEXT, description="Go on after this one: the `next` of the page before."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> SampleList:
    """Completions the policy wrote, those of the newest step first."""
    try:
        if after is not None and not re.fullmatch(r"[0-9]{1,18}", after):
            raise NotFound("sample", after)
        last = int(after) if after is not None else None
        rows = store.samples(job.id, step, limit + 1, last)
    except NotFound as error:
        raise unknown_cursor(error) from None
    page, more = rows[:limit], len(rows) > limit
    following = str(page[-1].id) if more else None
    return SampleList(data=[Sample.of(row) for row in page], has_more=more, next=following)


@router.get(
    "/{job_id}/checkpoints",
    operation_id="list_checkpoints",
    summary="Checkpoints",
    responses=responses(404),
)
def list_checkpoints(job: ExistingJob, store: StoreDep) -> CheckpointList:
    """Saved states, steps rising, each with the name of its adapter."""
    return CheckpointList(data=[Checkpoint.of(row) for row in store.checkpoints(job.id)])


@router.get(
    "/{job_id}/attempts", operation_id="list_attempts", summary="Attempts", responses=responses(404)
)
def list_attempts(job_id: Id, store: StoreDep) -> AttemptList:
    """Every worker's try at the job, in order."""
    return AttemptList(data=[Attempt.of(row) for row in store.attempts(job_id)])


@router.get(
    "/{job_id}/logs",
    operation_id="get_logs",
    summary="Logs",
    response_class=PlainTextResponse,
    responses=responses(404),
)
def get_logs(
    job: ExistingJob,
    settings: SettingsDep,
    tail: Annotated[int, Query(ge=1, le=10_000, description="So many lines.")] = 200,
) -> PlainTextResponse:
    """The last lines the engine printed; empty before it has begun."""
    text = last_lines(settings.run_dir(job.id) / "engine.log", tail)
    return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})
