"""POST /generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request

from service.body import parse, read_body
from service.context import SettingsDep, StoreDep
from service.errors import ApiError, responses
from service.generate.backend import InferenceBackend
from service.generate.schemas import EXAMPLES, GenerateRequest, Generation
from service.generate.serving import generate as answer

router = APIRouter(tags=["generate"])

AT_ONCE = 24
"""Requests that may wait for inference at the same time: fewer than the threads that serve all
routes, so that slow generation never keeps anybody from looking at a job."""


def _backend(request: Request) -> InferenceBackend:
    return cast(InferenceBackend, request.app.state.inference)


Body = Annotated[tuple[bytes, str], Depends(read_body)]


def _place(request: Request, _: Body) -> Iterator[None]:
    """Taken once the body is there: who sends slowly keeps nobody waiting."""
    places = cast(threading.BoundedSemaphore, request.app.state.generations)
    if not places.acquire(blocking=False):
        raise ApiError(
            429,
            "too_many_generations",
            f"{AT_ONCE} generations are running or waiting already; try again in a few seconds",
            headers={"Retry-After": "2"},
        )
    try:
        yield
    finally:
        places.release()


@router.post(
    "/generate",
    operation_id="generate",
    summary="Generate text",
    responses=responses(400, 404, 409, 413, 415, 422, 429, 502, 504),
    dependencies=[Depends(_place)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/GenerateRequest"},
                    "examples": EXAMPLES,
                }
            },
        }
    },
)
def generate(
    body: Body,
    store: StoreDep,
    settings: SettingsDep,
    backend: Annotated[InferenceBackend, Depends(_backend)],
) -> Generation:
    """Text from a trained adapter or from a bare base model; `model` may name either.

    An adapter is loaded when it is first asked for. Its prompts get the template of its training,
    unless `raw`; a base model has none, and continues the prompt as it is.
    """
    return answer(parse(body, GenerateRequest), store, settings, backend)
