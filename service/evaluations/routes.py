"""The routes of evaluations: their scores, their answers, and the same answers graded anew."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bridge_engine.evaluation.answers import COMPLETIONS
from bridge_engine.rewards.graders import GraderSpec
from bridge_engine.spec.base import Name
from bridge_engine.spec.errors import FieldError
from service.body import parse
from service.context import TEXT, ProjectDep, SettingsDep, StoreDep
from service.errors import invalid_fields, responses
from service.evaluations.scores import Scores, compared, scores
from service.evaluations.subject import checkpoint_folder, finished
from service.jobs import submit
from service.jobs.routes import Body, ExistingJob, announced
from service.jobs.schemas import Job
from service.store import NotFound

router = APIRouter(prefix="/jobs", tags=["evaluations"])

_WITHOUT_MODEL = {"device": "cpu", "attention": "auto"}
"""The runtime of a job that loads none: it waits for no GPU."""


def _grader(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Regrade(BaseModel):
    """How the answers of a finished evaluation shall be judged instead."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    grader: Annotated[GraderSpec, BeforeValidator(_grader)] | None = None
    """A name or an object with options; default: the evaluation's own, by today's rules."""
    verifier_timeout: Annotated[float, Field(gt=0, le=600)] | None = None
    """Seconds of computing for one answer; default: the evaluation's own."""
    name: Name | None = None
    """The new job's name; default: the evaluation's."""


@router.get(
    "/{job_id}/scores",
    operation_id="get_scores",
    summary="Scores",
    responses=responses(404, 409, 422, 503),
)
def get_scores(
    job: ExistingJob,
    store: StoreDep,
    settings: SettingsDep,
    against: Annotated[
        str | None,
        Query(pattern=TEXT, description="Another evaluation, to be compared problem by problem."),
    ] = None,
) -> Scores:
    """The scores of a finished evaluation with their 95 % intervals and all they have to be read
    with. `against` adds the paired difference to another evaluation on the problems of both."""
    if against is None:
        return scores(job)
    try:
        other = store.get_job(against)
    except NotFound as error:
        field = FieldError("against", "unknown_job", error.message, given=against)
        raise invalid_fields([field]) from None
    return compared(job, other, store, settings)


@router.get(
    "/{job_id}/completions",
    operation_id="get_completions",
    summary="Answers",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/jsonl": {}}, "description": "JSON Lines."},
        **responses(404, 409, 503),
    },
)
def get_completions(job: ExistingJob, store: StoreDep, settings: SettingsDep) -> FileResponse:
    """Every answer of a finished evaluation, a problem a line: its texts, what they state, and the
    verdicts with their reasons. The first line says what they depend on."""
    finished(job)
    path = checkpoint_folder(job, store, settings) / COMPLETIONS
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(
        path, media_type="application/jsonl", filename=f"{job.id}.jsonl", headers=headers
    )


@router.post(
    "/{job_id}/regrade",
    operation_id="regrade_job",
    summary="Grade again",
    status_code=201,
    responses=responses(400, 404, 409, 413, 415, 422, 503, 507),
    openapi_extra={
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Regrade"}}},
        }
    },
)
def regrade_job(
    source: ExistingJob,
    body: Body,
    store: StoreDep,
    settings: SettingsDep,
    response: Response,
    project: ProjectDep = None,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Makes a new evaluation out of the answers of a finished one, judged anew: nothing is sampled
    and no model is loaded. The old one stays as it is, to be compared with."""
    asked = parse(body, Regrade) if body[0].strip() else Regrade()
    finished(source)
    changes = asked.model_dump(mode="json", exclude_none=True)
    document = {
        **source.spec,
        "completions_of": source.id,
        "runtime": {**source.spec["runtime"], **_WITHOUT_MODEL},
        "resources": {**source.spec["resources"], "gpus": 0},
        **changes,
    }
    row, created = submit.create(
        submit.asked_for(document),
        store,
        settings,
        idempotency_key=idempotency_key,
        project_id=project or source.project_id,
        priority=source.priority,
        source=source,
    )
    return announced(store, response, row, created)
