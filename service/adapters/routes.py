"""The routes under /adapters."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from service.adapters.names import find_adapter
from service.context import TEXT, StoreDep
from service.errors import responses
from service.parameters import check_cursor

router = APIRouter(prefix="/adapters", tags=["adapters"])


class Adapter(BaseModel):
    """A trained LoRA adapter under its immutable name."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    name: str
    """JOB@STEP: the same weights for ever."""
    object: Literal["adapter"] = "adapter"
    job_id: str
    step: int
    base_model: str
    rank: int
    sha256: str
    """Of the weights file."""
    template: dict[str, Any]
    """How a problem becomes a prompt, as the job's spec has it."""
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
    check_cursor(store.adapter, after)
    rows, more = store.adapters(job_id, after, limit)
    data = [Adapter.model_validate(row) for row in rows]
    return AdapterList(data=data, has_more=more, next=rows[-1].name if more else None)


@router.get("/{name}", operation_id="get_adapter", summary="One adapter", responses=responses(404))
def get_adapter(name: str, store: StoreDep) -> Adapter:
    """The adapter that JOB@STEP, JOB@best, JOB@latest or JOB (the best, else the newest) means."""
    return Adapter.model_validate(find_adapter(store, name))
