"""From an adapter in the registry to an adapter that answers.

The database knows what exists, the backend what is loaded; nothing is remembered here, so either
may be restarted at any time. An adapter is loaded when it is first asked for, under its immutable
name, and called `ready` only once it has written something.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from pathlib import Path
from typing import Any

from bridge_engine import catalog
from bridge_engine.errors import EngineError
from bridge_engine.spec_errors import nearest_name
from service.adapters.names import find_adapter
from service.errors import ApiError
from service.generate.backend import InferenceBackend, LoadFailed, NotLoaded
from service.generate.prompting import adapter_template, templated
from service.generate.schemas import Choice, GenerateRequest, Generation, Usage
from service.settings import Settings
from service.store import AdapterRow, Store

log = logging.getLogger(__name__)

CANARY_TOKENS = 4
WEIGHTS = "adapter_model.safetensors"


def generate(
    request: GenerateRequest, store: Store, settings: Settings, backend: InferenceBackend
) -> Generation:
    """Answers the request by the adapter or base model it names. Raises `ApiError`."""
    if request.adapter is None:
        assert request.model is not None  # the schema demands one of the two
        return _by_base(request, request.model, backend)
    adapter = find_adapter(store, request.adapter)
    if request.model is not None and request.model != adapter.base_model:
        raise ApiError(
            409,
            "base_model_mismatch",
            f"adapter {adapter.name} was trained on {adapter.base_model}, not on "
            f"{request.model}; leave model out, or name that one",
            param="model",
            given=request.model,
            allowed=[adapter.base_model],
        )
    folder = settings.run_dir(adapter.job_id) / adapter.path
    if request.prompt is not None and not request.raw:
        content = templated(request.prompt, adapter_template(folder, adapter.template))
    else:
        content = _as_given(request)
    if adapter.status != "ready":
        _make_ready(adapter, folder, content, store, backend)
    body = {**_sampling(request), **content, "model": adapter.name}
    try:
        answer = backend.complete(_path(content), body)
    except NotLoaded:  # the backend was restarted since
        _make_ready(adapter, folder, content, store, backend)
        answer = _complete_loaded(backend, content, body)
    return _generation(answer, adapter.base_model, adapter.name)


def _by_base(request: GenerateRequest, model: str, backend: InferenceBackend) -> Generation:
    try:
        catalog.resolve_model(model)
    except EngineError as error:
        names = catalog.model_names()
        status = 404 if error.code == "unknown_model" else 503
        raise ApiError(
            status,
            error.code,
            error.message,
            param="model",
            given=model,
            allowed=names if status == 404 else None,
            nearest=nearest_name(model, names) if status == 404 else None,
        ) from None
    content = _as_given(request)
    body = {**_sampling(request), **content, "model": model}
    return _generation(_complete_loaded(backend, content, body), model, None)


def _make_ready(
    adapter: AdapterRow,
    folder: Path,
    content: dict[str, Any],
    store: Store,
    backend: InferenceBackend,
) -> None:
    """Loads the adapter and has it write a few tokens. What it cannot do is noted in the registry.

    The canary continues the request's own prompt: every tokenizer is sure to know it.
    """
    try:
        _check_files(adapter, folder)
        backend.load(adapter.name, folder, adapter.base_model)
    except LoadFailed as error:
        raise _not_servable(adapter, error.message, store) from error
    canary = {**content, "model": adapter.name, "max_tokens": CANARY_TOKENS, "temperature": 0.0}
    try:
        backend.complete(_path(content), canary)
    except NotLoaded as error:  # it said it had loaded it
        raise _not_servable(adapter, error.message, store) from error
    except ApiError as error:
        if error.code == "inference_failed":
            raise _not_servable(adapter, error.detail, store) from error
        raise  # too busy, or the prompt's own fault: says nothing about the adapter
    if adapter.status != "ready":
        store.mark_adapter(adapter.name, "ready")


def _check_files(adapter: AdapterRow, folder: Path) -> None:
    """Are the weights still those that were registered?"""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadFailed(f"its weights cannot be read: {error}") from error
    if found != adapter.sha256:
        raise LoadFailed(
            f"the weights in {folder} are not those that were registered (their SHA-256 is "
            f"{found[:12]}…, not {adapter.sha256[:12]}…)"
        )


def _not_servable(adapter: AdapterRow, reason: str, store: Store) -> ApiError:
    log.error("adapter %s cannot be served: %s", adapter.name, reason)
    store.mark_adapter(adapter.name, "failed", reason)
    return ApiError(
        502,
        "adapter_failed",
        f"adapter {adapter.name} cannot be served: {reason}",
        param="adapter",
        given=adapter.name,
    )


def _complete_loaded(
    backend: InferenceBackend, content: dict[str, Any], body: dict[str, Any]
) -> dict[str, Any]:
    try:
        return backend.complete(_path(content), body)
    except NotLoaded as error:
        raise ApiError(502, "inference_failed", error.message, param="model") from error


def _as_given(request: GenerateRequest) -> dict[str, Any]:
    if request.messages is not None:
        return {"messages": [message.model_dump() for message in request.messages]}
    return {"prompt": request.prompt}


def _path(content: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in content else "/v1/completions"


def _sampling(request: GenerateRequest) -> dict[str, Any]:
    names = {"max_tokens", "temperature", "top_p", "n", "stop", "seed"}
    return request.model_dump(include=names, exclude_none=True)


def _generation(answer: dict[str, Any], model: str, adapter: str | None) -> Generation:
    choices = [
        Choice(
            index=choice["index"],
            text=choice["text"] if "text" in choice else choice["message"]["content"],
            finish_reason=choice["finish_reason"],
        )
        for choice in answer["choices"]
    ]
    return Generation(
        id=f"gen_{uuid.uuid4().hex}",
        adapter=adapter,
        model=model,
        choices=choices,
        usage=Usage.model_validate(answer["usage"]),
    )
