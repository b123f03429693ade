"""The routes under /jobs that steer: cancel, pause, resume, retry, fork, priority."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, ConfigDict

from service.body import parse
from service.context import ProjectDep, SettingsDep, StoreDep
from service.errors import responses
from service.jobs import fork, submit
from service.jobs.routes import DRY_RUN, Body, DryRunAsked, ExistingJob, Id, announced, shown
from service.jobs.schemas import DryRun, Job

router = APIRouter(prefix="/jobs", tags=["jobs"])


class JobChanges(BaseModel):
    """What can be changed about a job that waits."""

    model_config = ConfigDict(extra="forbid")

    priority: fork.Priority


def _json_body(schema: str, *, required: bool) -> dict[str, object]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": required, "content": content}}


@router.post(
    "/{job_id}/cancel", operation_id="cancel_job", summary="Cancel", responses=responses(404)
)
def cancel_job(job_id: Id, store: StoreDep) -> Job:
    """Asks for the job's end. A queued or paused job is cancelled at once; a running one finishes
    its step, saves and leaves; one that has ended stays as it is. Asking twice is the same as
    once."""
    return shown(store, store.request(job_id, "cancel"))


@router.post(
    "/{job_id}/pause", operation_id="pause_job", summary="Pause", responses=responses(404, 409)
)
def pause_job(job_id: Id, store: StoreDep) -> Job:
    """Takes the job from its worker until it is resumed. A queued job is paused at once; a running
    one finishes its step, saves and leaves (`pausing`), and its worker is free for another."""
    return shown(store, store.request(job_id, "pause"))


@router.post(
    "/{job_id}/resume", operation_id="resume_job", summary="Resume", responses=responses(404, 409)
)
def resume_job(job_id: Id, store: StoreDep) -> Job:
    """Queues a paused job again; it goes on from its newest checkpoint."""
    return shown(store, store.request(job_id, "resume"))


@router.post(
    "/{job_id}/retry", operation_id="retry_job", summary="Retry", responses=responses(404, 409)
)
def retry_job(job_id: Id, store: StoreDep) -> Job:
    """Queues a failed or cancelled job again: the same job, which goes on from its newest
    checkpoint, with a fresh budget of attempts."""
    return shown(store, store.request(job_id, "retry"))


@router.post(
    "/{job_id}/fork",
    operation_id="fork_job",
    summary="Fork",
    status_code=201,
    response_model=Job | DryRun,
    responses={**DRY_RUN, **responses(400, 404, 409, 413, 415, 422, 507)},
    openapi_extra=_json_body("ForkRequest", required=False),
)
def fork_job(
    source: ExistingJob,
    body: Body,
    store: StoreDep,
    settings: SettingsDep,
    response: Response,
    dry_run: DryRunAsked = False,
    project: ProjectDep = None,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job | DryRun:
    """Makes a new job from this one's spec with changes, and leaves this one alone, whatever its
    status. `from_checkpoint` starts it from the parameters of one of this job's checkpoints. It
    belongs to this job's project unless the header names another."""
    request = fork.requested(body)
    spec = fork.forked(source, request)
    param = "from_checkpoint" if request.from_checkpoint is not None else "init.step"
    if dry_run:
        response.status_code = 200
        return submit.tried(spec, store, settings, source=source, param=param)
    row, created = submit.create(
        spec,
        store,
        settings,
        idempotency_key=idempotency_key,
        project_id=project or source.project_id,
        priority=source.priority if request.priority is None else request.priority,
        source=source,
        param=param,
    )
    return announced(store, response, row, created)


@router.patch(
    "/{job_id}",
    operation_id="update_job",
    summary="Change the priority",
    responses=responses(400, 404, 409, 413, 415, 422),
    openapi_extra=_json_body("JobChanges", required=True),
)
def update_job(job_id: Id, body: Body, store: StoreDep) -> Job:
    """Changes how soon the job's turn comes, while it is queued or paused."""
    changes = parse(body, JobChanges)
    return shown(store, store.set_priority(job_id, changes.priority))
