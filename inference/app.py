"""The HTTP face of the inference process: vLLM's routes and bodies, on loopback."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse

from bridge_engine.template import render_chat
from inference.errors import InferenceError, error_body
from inference.generation import Completion, SamplingParams, generate
from inference.hosts import OwnHostsOnly
from inference.registry import MAX_ADAPTERS, MAX_BASES, Adapter, Base, Registry
from inference.schemas import ChatRequest, CompletionRequest, LoadAdapter, Sampling, UnloadAdapter
from inference.worker import GenerationThread

DEFAULT_MAX_TOKENS = 256


def create_app(
    materialize: Callable[[str], Path],
    *,
    waiting: int = 64,
    device: str = "auto",
    max_adapters: int = MAX_ADAPTERS,
    max_bases: int = MAX_BASES,
    hosts: Iterable[str] = (),
) -> FastAPI:
    """The application. `materialize` turns a base model's name into a folder of weights; `waiting`
    is how many requests may queue for the one generation thread; `hosts` are names, beside
    loopback's, that this server may be called by."""
    registry = Registry(materialize, device, max_adapters=max_adapters, max_bases=max_bases)
    thread = GenerationThread(waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        thread.close()

    app = FastAPI(title="Bridge local inference", lifespan=lifespan)
    app.state.registry, app.state.thread = registry, thread
    app.add_middleware(OwnHostsOnly, hosts=tuple(hosts))
    _handle_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "device": registry.device}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is loaded. Base models that are not listed are loaded when they are first named."""
        bases = [_model_card(b.name, b.path, None, b) for b in list(registry.bases.values())]
        adapters = [
            _model_card(a.name, a.path, a.base.name, a.base, a.loaded_at)
            for a in list(registry.adapters.values())
        ]
        return {"object": "list", "data": bases + adapters}

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapter) -> PlainTextResponse:
        path = Path(body.lora_path)
        await thread.call(lambda: registry.load_adapter(body.lora_name, path, body.base_model))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapter) -> PlainTextResponse:
        await thread.call(lambda: registry.unload_adapter(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> dict[str, Any]:
        def work() -> tuple[int, list[Completion]]:
            target = registry.find(body.model)
            ids = _base(target).tokenizer(body.prompt)["input_ids"]
            return _answer(registry, target, ids, body, "prompt")

        prompt_tokens, answers = await thread.call(work)
        choices = [
            {"index": i, "text": a.text, "finish_reason": a.finish_reason, "logprobs": None}
            for i, a in enumerate(answers)
        ]
        return _response("text_completion", "cmpl", body.model, choices, prompt_tokens, answers)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> dict[str, Any]:
        def work() -> tuple[int, list[Completion]]:
            target = registry.find(body.model)
            ids = _chat_ids(_base(target), body)
            return _answer(registry, target, ids, body, "messages")

        prompt_tokens, answers = await thread.call(work)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": a.text},
                "finish_reason": a.finish_reason,
            }
            for i, a in enumerate(answers)
        ]
        return _response("chat.completion", "chatcmpl", body.model, choices, prompt_tokens, answers)

    return app


def _answer(
    registry: Registry, target: Base | Adapter, ids: list[int], body: Sampling, param: str
) -> tuple[int, list[Completion]]:
    """Checks the lengths against the context and generates."""
    context = _base(target).context
    if not ids:
        raise InferenceError("The prompt is empty: there is nothing to continue.", param=param)
    if len(ids) >= context:
        raise InferenceError(
            f"The prompt has {len(ids)} tokens; the context of {_base(target).name!r} is {context} "
            "tokens and must hold at least one more. Shorten the prompt.",
            param=param,
        )
    room = context - len(ids)
    if body.max_tokens is not None and body.max_tokens > room:
        raise InferenceError(
            f"{len(ids)} prompt tokens and max_tokens {body.max_tokens} are {len(ids)} + "
            f"{body.max_tokens} = {len(ids) + body.max_tokens} tokens; the context of "
            f"{_base(target).name!r} is {context}. Ask for at most {room}.",
            param="max_tokens",
        )
    params = SamplingParams(
        max_tokens=body.max_tokens or min(DEFAULT_MAX_TOKENS, room),
        temperature=body.temperature,
        top_p=body.top_p,
        n=body.n,
        stop=body.stop_strings(),
        seed=body.seed,
    )
    with registry.active(target) as model:
        return len(ids), generate(model, _base(target).tokenizer, ids, params)


def _chat_ids(base: Base, body: ChatRequest) -> list[int]:
    if base.tokenizer.chat_template is None:
        raise InferenceError(
            f"The base model {base.name!r} has no chat template: send a prompt to /v1/completions.",
            param="messages",
        )
    text = render_chat([message.model_dump() for message in body.messages], base.tokenizer)
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _base(target: Base | Adapter) -> Base:
    return target.base if isinstance(target, Adapter) else target


def _model_card(
    name: str, path: Path, parent: str | None, base: Base, loaded_at: float | None = None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(loaded_at or base.loaded_at),
        "owned_by": "bridge",
        "root": str(path),
        "parent": parent,
        "max_model_len": base.context,
    }


def _response(
    kind: str, prefix: str, model: str, choices: list[Any], prompt: int, answers: list[Completion]
) -> dict[str, Any]:
    completion = sum(answer.tokens for answer in answers)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(InferenceError)
    async def inference_error(request: Request, error: InferenceError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return JSONResponse(error_body(message, "BadRequestError", 400, param), 400)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        message = "The inference process failed on this request; its log has the details."
        return JSONResponse(error_body(message, "InternalServerError", 500), 500)
