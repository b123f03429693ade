"""POST /generate."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from service.body import parse
from service.errors import ApiError, interrupt, problem, responses
from service.generate.answers import AnswerStream
from service.generate.asking import AskingRoute, Body, serving_of
from service.generate.hanging_up import EventStream, unless_hung_up
from service.generate.pieces import read
from service.generate.prompting import adapter_template, templated
from service.generate.schemas import EXAMPLES, GenerateRequest, Generation
from service.generate.serving import Target

router = APIRouter(tags=["generate"], route_class=AskingRoute)


@router.post(
    "/generate",
    operation_id="generate",
    summary="Generate text",
    response_model=Generation,
    responses=responses(400, 404, 409, 413, 415, 422, 429, 502, 504, 507),
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
async def generate(request: Request, body: Body) -> Response:
    """Text from a trained adapter or from a bare base model; `model` may name either.

    An adapter is loaded when it is first asked for. Its prompts get the template of its training,
    unless `raw`; a base model has none, and continues the prompt as it is. With `stream` the answer
    is server-sent events: `data:` with a `generation.chunk`, the last of which has no choices but
    the `usage`, and then `data: [DONE]`; where it breaks off, `event: error` with a problem and no
    `[DONE]`.
    """
    wanted, serving = parse(body, GenerateRequest), serving_of(request)
    target = await serving.target(wanted.adapter, wanted.model)
    path, asked = _asked(wanted, target)
    head = {
        "id": f"gen_{uuid.uuid4().hex}",
        "adapter": target.adapter.name if target.adapter else None,
        "model": target.base_model,
    }
    if wanted.stream:
        asked["stream_options"] = {"include_usage": True}
        opened = await unless_hung_up(request, serving.stream(target, path, asked))
        logprobs = wanted.logprobs is not None
        return EventStream(_events(opened, head, logprobs, request), opened.aclose)
    answer = await unless_hung_up(request, serving.complete(target, path, asked))
    choices = [_choice(choice, wanted.logprobs is not None) for choice in answer["choices"]]
    told = Generation.model_validate({**head, "choices": choices, "usage": answer["usage"]})
    return Response(told.model_dump_json(), media_type="application/json")


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
) -> AsyncIterator[bytes]:
    head = {**head, "object": "generation.chunk"}
    try:
        async for chunks in opened.chunks():
            if said := b"".join(_said(chunk, head, logprobs) for chunk in chunks):
                yield said
    except ApiError as error:
        interrupt(request, error)
        yield b"event: error\n" + event(problem(error, request.state.request_id))
        return
    yield DONE


def _said(chunk: dict[str, Any], head: dict[str, Any], logprobs: bool) -> bytes:
    """The event for a chunk of the backend's; empty where it says nothing."""
    choices = [_choice(choice, logprobs) for choice in chunk["choices"]]
    choices = [c for c in choices if c["text"] or c["finish_reason"] or c["logprobs"]]
    usage = {"usage": chunk["usage"]} if chunk.get("usage") else {}
    return event({**head, "choices": choices, **usage}) if choices or usage else b""


DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % to_json(body, inf_nan_mode="constants")
