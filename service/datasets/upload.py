"""An uploaded file on its way to becoming a dataset: received, checked row by row, put in place.

The body goes straight to a file beside the datasets, so that its size costs no memory and putting
it in place is one rename: a dataset is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from bridge_engine.data.datasets import read_rows
from bridge_engine.data.example import Example
from bridge_engine.errors import DataError
from bridge_engine.spec.base import NAME_LENGTH, Name
from bridge_engine.state.checkpoint import sync
from service.datasets.multipart import FormReader
from service.errors import ApiError
from service.store import DatasetRow, Store, new_id

_PREFIX = ".upload-"
_ABANDONED_SECONDS = 3600.0 * 6


@dataclass
class Received:
    """A file that has come in whole."""

    path: Path
    filename: str
    name: str | None
    """What the sender calls the dataset."""
    sha256: str
    hint: str = ""
    """What may be the matter, if it cannot be read."""


@asynccontextmanager
async def receive(request: Request, folder: Path, limit: int) -> AsyncIterator[Received]:
    """The request's file, multipart or raw, in a temporary file that is gone afterwards.

    Raises `ApiError`: 400 for a broken form, 413 for more than `limit` bytes, 507 for a full disk.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit + 100_000:  # a form has a frame
        raise _too_large(limit)
    content_type = request.headers.get("content-type", "")
    form = FormReader(content_type) if content_type.startswith("multipart/form-data") else None
    with _disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_PREFIX}{uuid.uuid4().hex}"
        try:
            size, digest = 0, hashlib.sha256()
            with path.open("xb") as file:
                async for chunk in request.stream():
                    pieces = list(form.feed(chunk)) if form else [chunk]
                    size += sum(map(len, pieces))
                    if size > limit:
                        raise _too_large(limit)
                    await run_sync(_keep, file, digest, pieces)
            name, sha256 = request.query_params.get("name"), digest.hexdigest
            if form:
                filename = form.finish()
                name = name or _checked(form.fields.get("name"))
                yield Received(path, filename, name, sha256())
            else:
                hint = _CURL if content_type.startswith("application/x-www-form-urlencoded") else ""
                yield Received(path, name or "the uploaded file", name, sha256(), hint)
        finally:
            path.unlink(missing_ok=True)


_CURL = "; curl -d leaves the ends of lines out: send the file with --data-binary @FILE"


def _keep(file: IO[bytes], digest: Any, pieces: list[bytes]) -> None:
    for piece in pieces:
        digest.update(piece)
        file.write(piece)


def _checked(name: str | None) -> str | None:
    """The form's field `name`, held to what the parameter is."""
    try:
        return _NAME.validate_python(name)
    except ValidationError as error:
        found = error.errors()[0]
        message = f"name: {found['msg']}"
        raise ApiError(422, found["type"], message, param="name", given=name) from None


_NAME: TypeAdapter[str | None] = TypeAdapter(Name | None)


def add(store: Store, received: Received, folder: Path, limit: int) -> DatasetRow:
    """Checks every row, writes them in Bridge's own form and registers the dataset.

    Raises `ApiError` 422 that names the line at fault, 413 if it unpacks to more than `limit`
    bytes, 507 when the disk is full. Nothing of a refused file stays behind.
    """
    dataset_id = new_id("ds")
    draft = folder / f"{_PREFIX}{dataset_id}"
    final = folder / f"{dataset_id}.jsonl"
    with _disk_errors():
        try:
            written = _convert(received, draft, dataset_id, limit)
            os.replace(draft, final)
            sync(folder)  # or the new name may be lost with the power
        except DataError as error:
            detail = error.message + received.hint
            raise ApiError(422, error.code, detail, param="file") from None
        finally:
            draft.unlink(missing_ok=True)
    try:
        return store.add_dataset(
            id=dataset_id,
            name=received.name or _stem(received.filename)[:NAME_LENGTH],
            filename=received.filename,
            rows=written.rows,
            with_solution=written.with_solution,
            bytes=written.bytes,
            sha256=received.sha256,
        )
    except BaseException:
        final.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Written:
    rows: int
    with_solution: int
    bytes: int


def _stem(filename: str) -> str:
    """The name without what says of what form it is."""
    return _FORM.sub("", filename) or filename


_FORM = re.compile(r"(\.(jsonl|ndjson|json|parquet|txt))?(\.gz)?$", re.IGNORECASE)


def _convert(received: Received, draft: Path, dataset_id: str, limit: int) -> _Written:
    rows = with_solution = size = 0
    with draft.open("xb") as file:
        for example in read_rows(received.path, name=received.filename):
            line = _line(example, received.path.stem, dataset_id)
            size += len(line)
            if size > limit:
                raise _too_large(limit, "unpacks to")
            rows += 1
            with_solution += example.solution is not None
            file.write(line)
        _flush(file)
    return _Written(rows, with_solution, size)


def _line(example: Example, stem: str, dataset_id: str) -> bytes:
    row = {key: value for key, value in asdict(example).items() if value is not None}
    # Rows without an id of their own are numbered under the file's name, which was a passing one.
    if example.id.startswith(f"{stem}/"):
        row["id"] = dataset_id + example.id.removeprefix(stem)
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def sweep(folder: Path) -> None:
    """Deletes what uploads left behind that were cut short by the end of the process."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except OSError:
            continue  # another process was quicker


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full or unwritable disk, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ApiError(
                507,
                "disk_full",
                "the disk that holds Bridge's datasets is full; nothing was stored. Free some "
                "space (old run directories are the largest) and upload again",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ApiError(
                507,
                "disk_not_writable",
                "the service may not write to its datasets folder; nothing was stored",
            ) from error
        raise


def _too_large(limit: int, verb: str = "is") -> ApiError:
    return ApiError(
        413,
        "upload_too_large",
        f"the file {verb} larger than {limit} bytes; split it, or raise BRIDGE_MAX_UPLOAD_BYTES",
        param="file",
    )


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
