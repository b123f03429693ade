"""POST /generate."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request

from service.body import parse, read_body
from service.errors import ApiError, problem, responses
from service.generate.answers import AnswerStream
from service.generate.hanging_up import EventStream, unless_hung_up
from service.generate.pieces import read
from service.generate.prompting import adapter_template, templated
from service.generate.schemas import EXAMPLES, GenerateRequest, Generation
from service.generate.serving import Serving, Target

router = APIRouter(tags=["generate"])

AT_ONCE = 256
"""Requests that may wait for inference at the same time. Waiting costs a connection and no thread;
the inference process has a line of its own and says when that is full."""


async def _serving(request: Request) -> Serving:
    return cast(Serving, request.app.state.serving)


Body = Annotated[tuple[bytes, str], Depends(read_body)]
ServingDep = Annotated[Serving, Depends(_serving)]


async def place(request: Request, _: Body) -> AsyncIterator[None]:
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
    response_model=Generation,
    responses=responses(400, 404, 409, 413, 415, 422, 429, 502, 504),
    dependencies=[Depends(place)],
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
async def generate(body: Body, request: Request, serving: ServingDep) -> Any:
    """Text from a trained adapter or from a bare base model; `model` may name either.

    An adapter is loaded when it is first asked for. Its prompts get the template of its training,
    unless `raw`; a base model has none, and continues the prompt as it is. With `stream` the answer
    is server-sent events: `data:` with a `generation.chunk`, at last `data: [DONE]`; where it
    breaks off, `event: error` with a problem and no `[DONE]`.
    """
    wanted = parse(body, GenerateRequest)
    target = await serving.target(wanted.adapter, wanted.model)
    path, asked = _asked(wanted, target)
    head = {
        "id": f"gen_{uuid.uuid4().hex}",
        "adapter": target.adapter.name if target.adapter else None,
        "model": target.base_model,
    }
    if wanted.stream:
        opened = await unless_hung_up(request, serving.stream(target, path, asked))
        logprobs = wanted.logprobs is not None
        return EventStream(_events(opened, head, logprobs, request), opened.aclose)
    answer = await unless_hung_up(request, serving.complete(target, path, asked))
    choices = [_choice(choice, wanted.logprobs is not None) for choice in answer["choices"]]
    return Generation.model_validate({**head, "choices": choices, "usage": answer["usage"]})


def _asked(wanted: GenerateRequest, target: Target) -> tuple[str, dict[str, Any]]:
    """The backend's route and the body for it."""
    content: dict[str, Any]
    if wanted.messages is not None:
        content = {"messages": [message.model_dump() for message in wanted.messages]}
    elif target.adapter is not None and not wanted.raw:
        assert wanted.prompt is not None  # the schema demands one of the two
        template = adapter_template(target.card, target.adapter.template)
        content = templated(wanted.prompt, template)
    else:
        content = {"prompt": wanted.prompt}
    names = {"max_tokens", "temperature", "top_p", "n", "stop", "seed"}
    sampling = wanted.model_dump(include=names, exclude_none=True)
    return route_of(content), {**sampling, **content, **logprobs_for(content, wanted.logprobs)}


def route_of(content: dict[str, Any]) -> str:
    """The backend's route for a prompt, or for messages."""
    return "/v1/chat/completions" if "messages" in content else "/v1/completions"


def logprobs_for(content: dict[str, Any], logprobs: int | None) -> dict[str, Any]:
    """How that route is asked for log-probabilities."""
    if logprobs is None:
        return {}
    if "messages" in content:
        return {"logprobs": True, "top_logprobs": logprobs}
    return {"logprobs": logprobs}


def _choice(choice: dict[str, Any], logprobs: bool) -> dict[str, Any]:
    piece = read(choice)
    return {
        "index": piece.index,
        "text": piece.text,
        "finish_reason": piece.finish_reason,
        "logprobs": piece.logprobs if logprobs else None,
    }


async def _events(
    opened: AnswerStream, head: dict[str, Any], logprobs: bool, request: Request
) -> AsyncIterator[str]:
    head = {**head, "object": "generation.chunk"}
    try:
        async for chunk in opened.chunks():
            choices = [_choice(choice, logprobs) for choice in chunk["choices"]]
            choices = [c for c in choices if c["text"] or c["finish_reason"] or c["logprobs"]]
            usage = {"usage": chunk["usage"]} if chunk.get("usage") else {}
            if choices or usage:
                yield event({**head, "choices": choices, **usage})
    except ApiError as error:
        yield f"event: error\n{event(problem(error, request.state.request_id))}"
        return
    yield DONE


DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
