"""The HTTP face of the inference process: vLLM's routes and bodies, on loopback."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Scope

from bridge_http.bodiless import HeadAsGet
from bridge_http.requests import RequestLog, note_trouble, request_id
from inference.completions import answer, chat_prompt, text_prompts
from inference.errors import InferenceError, error_body
from inference.hosts import OwnHostsOnly
from inference.limits import Limits
from inference.registry import Base, Registry
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.schemas import (
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    LoadModel,
    UnloadAdapter,
)

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""What has begun when the process is asked to stop may go on for so long."""


def create_app(
    materialize: Callable[[str], Path],
    *,
    waiting: int = 64,
    device: str = "auto",
    limits: Limits | None = None,
    hosts: Iterable[str] = (),
) -> FastAPI:
    """The application. `materialize` turns a base model's name into a folder of weights; `waiting`
    is how many requests may wait to be begun; `hosts` are names, beside loopback's, that this
    server may be called by."""
    registry = Registry(materialize, device, limits)
    scheduler = Scheduler(waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        registry.close()
        scheduler.close()

    app = FastAPI(title="Bridge local inference", lifespan=lifespan)
    app.state.registry, app.state.scheduler = registry, scheduler
    app.add_middleware(HeadAsGet)
    app.add_middleware(OwnHostsOnly, hosts=tuple(hosts))
    _handle_errors(app)
    app.add_middleware(RequestLog, failed=_failed)  # last, so that it is the outermost layer

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "device": registry.device, **scheduler.figures()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is loaded. Base models that are not listed are loaded when they are first named."""
        bases = [
            _model_card(b.name, b.path, None, b, b.loaded_at) | {"pinned": b.pinned}
            for b in registry.bases.values()
        ]
        adapters = [
            _model_card(a.name, a.path, a.base.name, a.base, a.loaded_at) | {"pinned": a.pinned}
            for a in registry.adapters.values()
        ]
        return {"object": "list", "data": bases + adapters}

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapter) -> PlainTextResponse:
        path = Path(body.lora_path)
        await registry.load_adapter(
            body.lora_name, path, body.base_model, body.sha256, pinned=body.pinned
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/load_model")
    async def load_model(body: LoadModel) -> PlainTextResponse:
        await registry.load_model(body.name, Path(body.path), pinned=body.pinned)
        return PlainTextResponse(f"Success: model '{body.name}' loaded.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapter) -> PlainTextResponse:
        registry.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.echo and (body.stream or body.n > 1):
            raise InferenceError("echo is for n 1 without stream.", param="echo")

        def params(max_tokens: int) -> SamplingParams:
            return SamplingParams(
                *(max_tokens, body.temperature, body.top_p, body.n, body.stop_strings()),
                *(body.seed, body.logprobs, body.echo),
            )

        return await answer(
            registry, scheduler, request, body, lambda base: text_prompts(base, body), params
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise InferenceError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None

        def params(max_tokens: int) -> SamplingParams:
            return SamplingParams(
                *(max_tokens, body.temperature, body.top_p, body.n, body.stop_strings()),
                *(body.seed, logprobs),
            )

        return await answer(
            registry, scheduler, request, body, lambda base: [chat_prompt(base, body)], params
        )

    return app


def _model_card(
    name: str, path: Path, parent: str | None, base: Base, loaded_at: float
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(loaded_at),
        "owned_by": "bridge",
        "root": str(path),
        "parent": parent,
        "max_model_len": base.context,
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(InferenceError)
    async def inference_error(request: Request, error: InferenceError) -> JSONResponse:
        note_trouble(request.scope, error.type, error.message)
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        note_trouble(request.scope, "BadRequestError", message)
        return JSONResponse(error_body(message, "BadRequestError", 400, param), 400)


def _failed(scope: Scope, error: Exception) -> JSONResponse:
    log.error("request %s failed unforeseen", request_id(scope), exc_info=error)
    note_trouble(scope, "InternalServerError", type(error).__name__)
    message = "The inference process failed on this request; its log has the details."
    return JSONResponse(error_body(message, "InternalServerError", 500), 500)
