"""Users' own names for adapters: GET, PUT and DELETE /adapters/aliases."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from bridge_engine.models import catalog
from service.adapters.names import find_adapter
from service.body import parse, read_body
from service.context import StoreDep
from service.errors import ApiError, responses
from service.store import Store

router = APIRouter(prefix="/adapters/aliases", tags=["adapters"])


def _alias(text: str) -> str:
    if not re.fullmatch(_NAME, text):
        raise PydanticCustomError(
            "wrong_alias",
            "an alias has up to 64 letters (a-z, A-Z), digits, dots, - and _, and begins with a "
            "letter or a digit",
        )
    return text


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
AliasName = Annotated[
    str, Path(json_schema_extra={"pattern": f"^{_NAME}$"}), AfterValidator(_alias)
]


class AliasRequest(BaseModel):
    """What an alias shall mean."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    adapter: str
    """JOB@STEP, JOB@best, JOB@latest, JOB or another alias, as it stands now: an alias always means
    one adapter, until it is put again."""


class Alias(BaseModel):
    """A name of your own for an adapter."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    name: str
    object: Literal["alias"] = "alias"
    adapter: str
    """The immutable name it stands for."""
    created_at: datetime
    updated_at: datetime


class AliasList(BaseModel):
    """Every alias."""

    object: Literal["list"] = "list"
    data: list[Alias]


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/AliasRequest"}}},
    }
}


@router.get("", operation_id="list_aliases", summary="List aliases", responses=responses())
def list_aliases(store: StoreDep) -> AliasList:
    """Every alias and the adapter it stands for, by name."""
    return AliasList(data=[Alias.model_validate(row) for row in store.aliases()])


@router.put(
    "/{name}",
    operation_id="put_alias",
    summary="Give an adapter a name",
    responses=responses(400, 404, 409, 413, 415, 422),
    openapi_extra=_BODY,
)
async def put_alias(
    name: AliasName,
    store: StoreDep,
    request: Request,
    body: Annotated[tuple[bytes, str], Depends(read_body)],
) -> Alias:
    """Lets the name stand for an adapter; one that stands for another is moved. Generation asks for
    it like for any adapter: `"adapter": "NAME"`."""
    wanted = parse(body, AliasRequest)
    alias = await run_in_threadpool(_put, store, name, wanted.adapter)
    request.app.state.controller.changed()
    return alias


def _put(store: Store, name: str, adapter: str) -> Alias:
    if name in catalog.model_names():
        raise ApiError(
            409,
            "name_taken",
            f"{name!r} is the name of a base model; take another",
            param="name",
            given=name,
        )
    if name.startswith("job_"):
        raise ApiError(
            409,
            "name_taken",
            "names that begin with job_ are those of jobs; take another",
            param="name",
            given=name,
        )
    return Alias.model_validate(store.set_alias(name, find_adapter(store, adapter).name))


@router.delete(
    "/{name}",
    operation_id="delete_alias",
    summary="Forget a name",
    status_code=204,
    responses=responses(404, 422),
)
async def delete_alias(name: AliasName, store: StoreDep, request: Request) -> Response:
    """The name stands for nothing any more; its adapter stays."""
    await run_in_threadpool(store.delete_alias, name)
    request.app.state.controller.changed()
    return Response(status_code=204)
