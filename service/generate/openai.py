"""OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, for the unchanged client."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from service.body import parse
from service.context import StoreDep
from service.errors import ApiError, interrupt, responses
from service.generate.answers import AnswerStream
from service.generate.asking import AskingRoute, Body, serving_of
from service.generate.backends import Bases
from service.generate.hanging_up import EventStream, unless_hung_up
from service.generate.openai_schemas import ChatRequest, CompletionRequest, Model, ModelList
from service.generate.pieces import Piece, chat_choice, read, text_choice
from service.generate.prompting import adapter_template, templated
from service.generate.routes import DONE, event, logprobs_for, route_of
from service.generate.serving import Serving, Target, base_names
from service.openai_errors import as_openai
from service.store import Store

router = APIRouter(prefix="/v1", tags=["openai"])
asking = APIRouter(prefix="/v1", tags=["openai"], route_class=AskingRoute)

ADAPTERS = 200
"""So many of the newest adapters are listed; the older ones answer all the same."""


def _body_of(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.get("/models", operation_id="openai_models", summary="Models", responses=responses())
async def models(request: Request, store: StoreDep) -> ModelList:
    """Base models, the newest adapters (with their `parent`), and aliases (with their `root`)."""
    bases = await serving_of(request).backends.bases()
    return ModelList(data=await run_in_threadpool(_models, store, bases))


@router.get(
    "/models/{model:path}",
    operation_id="openai_model",
    summary="One model",
    responses=responses(404),
)
async def model(request: Request, model: str) -> Model:
    """One base model or adapter."""
    target = await serving_of(request).target(None, model)
    if target.adapter is None:
        return Model(id=target.base_model, created=0)
    created = int(target.adapter.created_at.timestamp())
    return Model(id=target.adapter.name, created=created, parent=target.base_model)


def _models(store: Store, served: Bases) -> list[Model]:
    bases = [Model(id=name, created=0) for name in base_names(served)]
    rows = store.adapters(limit=ADAPTERS)[0]
    adapters = [
        Model(id=row.name, created=int(row.created_at.timestamp()), parent=row.base_model)
        for row in rows
    ]
    aliases = store.aliases()
    parents = {
        row.name: row.base_model
        for row in store.adapters_named([alias.adapter for alias in aliases])
    }
    named = [
        Model(
            id=alias.name,
            created=int(alias.updated_at.timestamp()),
            parent=parents.get(alias.adapter),
            root=alias.adapter,
        )
        for alias in aliases
    ]
    return [*bases, *named, *adapters]


@asking.post(
    "/completions",
    operation_id="openai_completions",
    summary="Continue a text",
    response_model=None,
    responses=responses(400, 404, 409, 413, 415, 429, 502, 504, 507),
    openapi_extra=_body_of("CompletionRequest"),
)
async def completions(request: Request, body: Body) -> Response:
    """The prompt is continued as it is; use /generate or a chat for an adapter's own template."""
    wanted, serving = parse(body, CompletionRequest), serving_of(request)
    target = await serving.target(None, wanted.model)
    asked: dict[str, Any] = {**wanted.sampling(), "prompt": wanted.prompt}
    if wanted.logprobs is not None:
        asked["logprobs"] = wanted.logprobs
    shape = _Shape(target, chat=False, logprobs=wanted.logprobs is not None)
    return await _answer(serving, target, asked, wanted, shape, request)


@asking.post(
    "/chat/completions",
    operation_id="openai_chat_completions",
    summary="Answer a conversation",
    response_model=None,
    responses=responses(400, 404, 409, 413, 415, 429, 502, 504, 507),
    openapi_extra=_body_of("ChatRequest"),
)
async def chat_completions(request: Request, body: Body) -> Response:
    """The conversation goes through the base model's chat template. An adapter that was trained on
    plain prompts gets the user's message in the template of its training."""
    wanted, serving = parse(body, ChatRequest), serving_of(request)
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise ApiError(
            422, "impossible_combination", "top_logprobs needs logprobs", param="top_logprobs"
        )
    target = await serving.target(None, wanted.model)
    content = _conversation(wanted, target)
    logprobs = (wanted.top_logprobs or 0) if wanted.logprobs else None
    asked = {**wanted.sampling(), **content, **logprobs_for(content, logprobs)}
    shape = _Shape(target, chat=True, logprobs=logprobs is not None)
    return await _answer(serving, target, asked, wanted, shape, request)


def _conversation(wanted: ChatRequest, target: Target) -> dict[str, Any]:
    """{"messages": …}, or {"prompt": …} for an adapter that knows no chats."""
    messages = [message.plain() for message in wanted.messages]
    if target.adapter is None:
        return {"messages": messages}
    template = adapter_template(target.card, target.adapter.template)
    if template.get("kind") != "plain":
        return {"messages": messages}
    if [message["role"] for message in messages] != ["user"]:
        raise ApiError(
            422,
            "no_conversation",
            f"{target.name} was trained on single problems in a plain template, not on "
            "conversations: send one message of the user, or a prompt to /v1/completions",
            param="messages",
        )
    return templated(messages[0]["content"], template)


class _Shape:
    """One answer's shape: a chat's or a text's."""

    def __init__(self, target: Target, *, chat: bool, logprobs: bool) -> None:
        self.chat, self.logprobs = chat, logprobs
        self._kind = "chat.completion" if chat else "text_completion"
        self._places: defaultdict[int, int] = defaultdict(int)
        """Where in each choice's text the next token of a stream begins."""
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": target.name,
        }

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(read(choice), streamed=False) for choice in answer["choices"]]
        return {**self._head, "object": self._kind, "choices": choices, "usage": answer["usage"]}

    def opening(self, index: int) -> bytes:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "finish_reason": None}])

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """One chunk of the backend's; empty where it says nothing."""
        read_ones = [read(choice) for choice in chunk["choices"]]
        told = [p for p in read_ones if p.text or p.finish_reason or p.logprobs]
        usage = chunk.get("usage")
        if not told and not usage:
            return b""
        more = {"usage": usage} if usage else {}
        return self._chunk([self._choice(piece, streamed=True) for piece in told], **more)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else self._kind
        return event({**self._head, "object": kind, "choices": choices, **more})

    def _choice(self, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        if self.chat:
            return chat_choice(piece, streamed=streamed, logprobs=self.logprobs)
        start = self._places[piece.index]
        self._places[piece.index] += sum(len(entry["token"]) for entry in piece.logprobs)
        return text_choice(piece, logprobs=self.logprobs, start=start)


async def _answer(
    serving: Serving,
    target: Target,
    asked: dict[str, Any],
    wanted: ChatRequest | CompletionRequest,
    shape: _Shape,
    request: Request,
) -> Response:
    path = route_of(asked)
    if not wanted.stream:
        answer = await unless_hung_up(request, serving.complete(target, path, asked))
        return JSONResponse(shape.whole(answer))
    if wanted.with_usage:
        asked["stream_options"] = {"include_usage": True}
    opened = await unless_hung_up(request, serving.stream(target, path, asked))
    return EventStream(_events(opened, shape, wanted.n or 1, request), opened.aclose)


async def _events(
    opened: AnswerStream, shape: _Shape, n: int, request: Request
) -> AsyncIterator[bytes]:
    if shape.chat:
        for index in range(n):
            yield shape.opening(index)
    try:
        async for chunks in opened.chunks():
            if said := b"".join(map(shape.chunk, chunks)):
                yield said
    except ApiError as error:
        interrupt(request, error)
        called = request.state.request_id
        yield event(as_openai(error.status, error.code, error.detail, None, called)[1])
        return  # no [DONE]: nobody may take it for an end
    yield DONE
