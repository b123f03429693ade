"""The routes under /adapters."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from service.adapters.download import package
from service.adapters.files import adapter_folder
from service.adapters.names import find_adapter
from service.artifacts import Damaged
from service.context import TEXT, SettingsDep, StoreDep
from service.errors import ApiError, responses
from service.parameters import check_cursor
from service.store.adapters import STUDENT

router = APIRouter(prefix="/adapters", tags=["adapters"])


class Adapter(BaseModel):
    """A trained LoRA adapter under its immutable name, or the whole model of a full student."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    name: str
    """JOB@STEP: the same weights for ever."""
    object: Literal["adapter"] = "adapter"
    job_id: str
    step: int
    base_model: str
    rank: int
    """0: a whole model."""
    sha256: str
    """Of the weights file; of a whole model's manifest."""
    template: dict[str, Any]
    """How a problem becomes a prompt, with `auto` decided; of an older run as the spec has it."""
    accuracy: float | None
    """Held-out accuracy in 0…1, where it was measured."""
    status: Literal["registered", "ready", "failed"]
    """`ready` once it has answered, `failed` with `error` when it could not."""
    error: str | None
    created_at: datetime


class AdapterList(BaseModel):
    """One page of adapters, those of newer jobs and later steps first."""

    object: Literal["list"] = "list"
    data: list[Adapter]
    has_more: bool
    next: str | None


@router.get("", operation_id="list_adapters", summary="List adapters", responses=responses(404))
def list_adapters(
    store: StoreDep,
    job_id: Annotated[str | None, Query(pattern=TEXT, description="Of this job alone.")] = None,
    after: Annotated[str | None, Query(pattern=TEXT)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AdapterList:
    """Trained adapters, those of newer jobs and later steps first."""
    if job_id is not None:
        store.get_job(job_id)
    check_cursor(store.adapter, after)
    rows, more = store.adapters(job_id, after, limit)
    data = [Adapter.model_validate(row) for row in rows]
    return AdapterList(data=data, has_more=more, next=rows[-1].name if more else None)


@router.get("/{name}", operation_id="get_adapter", summary="One adapter", responses=responses(404))
def get_adapter(name: str, store: StoreDep) -> Adapter:
    """The adapter that JOB@STEP, JOB@best, JOB@latest or JOB (the best, else the newest) means."""
    return Adapter.model_validate(find_adapter(store, name, "name"))


@router.get(
    "/{name}/download",
    operation_id="download_adapter",
    summary="Download an adapter",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/zip": {}}, "description": "The archive."},
        304: {"description": "It is the one that If-None-Match names."},
        **responses(404, 502, 503),
    },
)
def download_adapter(
    name: str,
    store: StoreDep,
    settings: SettingsDep,
    if_none_match: Annotated[str | None, Header(description="An ETag of before.")] = None,
) -> Response:
    """A zip archive that PEFT loads once it is unpacked: adapter_config.json, the weights,
    bridge.json and a model card. Everything in it was verified; its own SHA-256 is in Repr-Digest
    and, in hexadecimal, the ETag."""
    adapter = find_adapter(store, name, "name")
    try:
        folder = adapter_folder(adapter, store, settings)
        job, evaluations = store.get_job(adapter.job_id), store.evaluations_of(adapter.name)
        made = package(adapter, job, folder, evaluations)
    except Damaged as error:
        raise ApiError(
            502,
            "adapter_damaged",
            f"adapter {adapter.name} cannot be sent: {error.message}",
            param="adapter",
            given=adapter.name,
            outside=f"adapter {adapter.name} is damaged; the service's log says how",
        ) from error
    student = adapter.name.endswith(STUDENT)
    filename = f"{adapter.job_id}-step-{adapter.step}{STUDENT if student else ''}.zip"
    digest = base64.b64encode(bytes.fromhex(made.sha256)).decode()
    headers = {
        "ETag": f'"{made.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match is not None and headers["ETag"] in if_none_match:
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(made.size)
    return StreamingResponse(made.chunks(), media_type="application/zip", headers=headers)
