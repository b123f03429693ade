"""The routes under /projects."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from service.body import parse, read_body
from service.context import OneLine, StoreDep
from service.errors import responses
from service.store import NotFound

router = APIRouter(prefix="/projects", tags=["projects"])
Body = Annotated[tuple[bytes, str], Depends(read_body)]


def _project_id(text: str) -> str:
    if not re.fullmatch(_ID, text):
        raise PydanticCustomError(
            "wrong_project_id",
            "it must be up to 63 of a-z, 0-9, - and _, and begin with a letter or a digit",
        )
    return text


_ID = r"[a-z0-9][a-z0-9_-]{0,62}"
ProjectId = Annotated[
    str, AfterValidator(_project_id), Field(json_schema_extra={"pattern": f"^{_ID}$"})
]


class ProjectChanges(BaseModel):
    """A project's name and quotas; a quota that is left out is none."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    name: Annotated[OneLine, Field(min_length=1, max_length=200)]
    """A name for people."""
    max_running: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Jobs that may run at the same time; 0 starts none, null any number."""
    gpu_hours: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None
    """No job that takes a GPU is started once these are used up; null: no limit."""


class NewProject(ProjectChanges):
    """A project to be made."""

    id: ProjectId | None = None
    """What the header `Bridge-Project` names it by; default: a new id."""


class Project(BaseModel):
    """A project and what it has used."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    id: str
    object: Literal["project"] = "project"
    name: str
    max_running: int | None
    gpu_hours: float | None
    gpu_seconds_used: float
    """By attempts that have ended: seconds times GPUs."""
    created_at: datetime


class ProjectList(BaseModel):
    """All projects, by id."""

    object: Literal["list"] = "list"
    data: list[Project]
    has_more: bool = False
    next: str | None = None


def _json_body(schema: str) -> dict[str, object]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _id(project_id: str) -> str:
    if not project_id.isascii() or not project_id.isprintable():
        raise NotFound("project", project_id)
    return project_id


Id = Annotated[str, Depends(_id)]


@router.get("", operation_id="list_projects", summary="List projects", responses=responses())
def list_projects(store: StoreDep) -> ProjectList:
    """Every project with its quotas."""
    return ProjectList(data=[Project.model_validate(row) for row in store.projects()])


@router.post(
    "",
    operation_id="create_project",
    summary="Make a project",
    status_code=201,
    responses=responses(400, 409, 413, 415, 422),
    openapi_extra=_json_body("NewProject"),
)
def create_project(body: Body, store: StoreDep, response: Response) -> Project:
    """Makes a project. Jobs are submitted to it with the header `Bridge-Project`."""
    new = parse(body, NewProject)
    row = store.create_project(
        new.name, project_id=new.id, max_running=new.max_running, gpu_hours=new.gpu_hours
    )
    response.headers["Location"] = f"/projects/{row.id}"
    return Project.model_validate(row)


@router.get(
    "/{project_id}", operation_id="get_project", summary="One project", responses=responses(404)
)
def get_project(project_id: Id, store: StoreDep) -> Project:
    """The project as it is now."""
    return Project.model_validate(store.project(project_id))


@router.put(
    "/{project_id}",
    operation_id="update_project",
    summary="Change a project",
    responses=responses(400, 404, 413, 415, 422),
    openapi_extra=_json_body("ProjectChanges"),
)
def update_project(project_id: Id, body: Body, store: StoreDep) -> Project:
    """Gives the project this name and these quotas. Jobs that run already go on."""
    new = parse(body, ProjectChanges)
    row = store.update_project(
        project_id, name=new.name, max_running=new.max_running, gpu_hours=new.gpu_hours
    )
    return Project.model_validate(row)
