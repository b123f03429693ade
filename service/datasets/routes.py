"""The routes under /datasets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from service.context import TEXT, OneLine, SettingsDep, StoreDep
from service.datasets.upload import Received, add, receive
from service.errors import responses
from service.parameters import check_cursor
from service.store import NotFound

router = APIRouter(prefix="/datasets", tags=["datasets"])


class Dataset(BaseModel):
    """An uploaded dataset; its id is its name in a spec."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    filename: str
    rows: int
    with_solution: int
    """How many rows have a worked solution; as demos, all must."""
    bytes: int
    """Of the rows as they are kept."""
    sha256: str
    """Of the file as it was uploaded: of the same file, the same."""
    created_at: datetime


class DatasetList(BaseModel):
    """One page of datasets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    has_more: bool
    next: str | None


async def _received(
    request: Request,
    settings: SettingsDep,
    name: Annotated[OneLine | None, Query(max_length=200, description="A name for people.")] = None,
) -> AsyncIterator[Received]:
    async with receive(request, settings.datasets_dir, settings.max_upload_bytes) as file:
        yield file


_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": _FILE, "name": {"type": "string"}},
                }
            },
            "application/jsonl": {
                "schema": {"type": "string"},
                "example": '{"problem": "2+3?", "answer": "5", "solution": "2+3=5"}\n',
            },
            "application/vnd.apache.parquet": {"schema": _FILE},
        },
    }
}


@router.post(
    "",
    operation_id="upload_dataset",
    summary="Upload a dataset",
    status_code=201,
    responses=responses(400, 413, 422, 507),
    openapi_extra=_BODY,
)
def upload_dataset(
    file: Annotated[Received, Depends(_received)],
    store: StoreDep,
    settings: SettingsDep,
    response: Response,
) -> Dataset:
    """Takes JSON Lines (plain or gzip) or Parquet, as a form's `file` or as the body itself.

    Columns: `problem`, `answer`, and optionally `solution`, `id`, `kind`, `level`. Every row is
    checked; the first that cannot be used is named by its line, and nothing is kept.
    """
    row = add(store, file, settings.datasets_dir, settings.max_upload_bytes)
    response.headers["Location"] = f"/datasets/{row.id}"
    return Dataset.model_validate(row)


@router.get(
    "", operation_id="list_datasets", summary="List datasets", responses=responses(404, 422)
)
def list_datasets(
    store: StoreDep,
    after: Annotated[str | None, Query(pattern=TEXT)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> DatasetList:
    """Uploaded datasets, newest first."""
    check_cursor(store.get_dataset, after)
    rows, more = store.list_datasets(after, limit)
    following = rows[-1].id if more else None
    data = [Dataset.model_validate(row) for row in rows]
    return DatasetList(data=data, has_more=more, next=following)


@router.get(
    "/{dataset_id}", operation_id="get_dataset", summary="One dataset", responses=responses(404)
)
def get_dataset(dataset_id: str, store: StoreDep) -> Dataset:
    """What is known of an uploaded dataset."""
    if not dataset_id.isascii() or not dataset_id.isprintable():
        raise NotFound("dataset", dataset_id)
    return Dataset.model_validate(store.get_dataset(dataset_id))
