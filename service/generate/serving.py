"""From an adapter in the registry to an adapter that answers.

The database knows what exists, the backend what is loaded; nothing is remembered here, so either
may be restarted, and the backend may unload what it likes, at any time. An adapter is loaded when
it is asked for and not there, and called `ready` only once it has written something.

JOB@STEP is what people say, but not for ever the same bytes: a job that goes on from an earlier
checkpoint on another machine may save the step again with other last digits. So the backend knows
an adapter by JOB@STEP and its weights' digest; it can never answer from weights of the past.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

from bridge_engine import catalog
from bridge_engine.errors import EngineError
from bridge_engine.spec_errors import nearest_name
from service.adapters.files import adapter_folder, check_weights
from service.adapters.names import find_adapter, look_up, newest
from service.artifacts import Damaged
from service.errors import ApiError
from service.generate.backend import InferenceBackend, LoadFailed, NotLoaded
from service.generate.prompting import adapter_template, templated
from service.generate.schemas import Choice, GenerateRequest, Generation, Usage
from service.settings import Settings
from service.store import AdapterRow, NotFound, Store

log = logging.getLogger(__name__)

CANARY_TOKENS = 4
TRIES = 3
"""Times an adapter is loaded for one request, where it is unloaded again before it can answer."""
_LISTED = 20
"""So many of the newest adapters are listed to somebody who named none."""


def generate(
    request: GenerateRequest, store: Store, settings: Settings, backend: InferenceBackend
) -> Generation:
    """Answers the request by the adapter or base model it names. Raises `ApiError`."""
    if request.adapter is None:
        assert request.model is not None  # the schema demands one of the two
        if (adapter := _adapter_of(request.model, store)) is None:
            return _by_base(request, request.model, backend)
        return _by_adapter(request, adapter, store, settings, backend)
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
    return _by_adapter(request, adapter, store, settings, backend)


def _adapter_of(model: str, store: Store) -> AdapterRow | None:
    """The adapter a request's `model` names, None for a base model; `ApiError` 404 for neither."""
    models = catalog.model_names()
    if model in models or "/" in model:  # the latter is the hub's to know
        return None
    try:
        return look_up(store, model)
    except NotFound as error:
        adapters = newest(store)
        near = nearest_name(model, [*models, *adapters])
        hint = f"; did you mean {near!r}?" if near else ""
        raise ApiError(
            404,
            "unknown_model",
            f"{model!r} is neither a base model ({', '.join(models)}, or owner/name on the Hugging "
            f"Face hub) nor an adapter ({error.message}){hint}",
            param="model",
            given=model,
            allowed=[*models, *adapters[:_LISTED]],
            nearest=near,
        ) from None


def _by_adapter(
    request: GenerateRequest,
    adapter: AdapterRow,
    store: Store,
    settings: Settings,
    backend: InferenceBackend,
) -> Generation:
    try:
        folder = adapter_folder(adapter, store, settings)
    except Damaged as error:
        raise _not_servable(adapter, error.message, store) from error
    if request.prompt is not None and not request.raw:
        content = templated(request.prompt, adapter_template(folder, adapter.template))
    else:
        content = _as_given(request)
    body = {**_sampling(request), **content, "model": loaded_name(adapter)}
    answer = _complete(adapter, folder, body, store, backend)
    return _generation(answer, adapter.base_model, adapter.name)


def loaded_name(adapter: AdapterRow) -> str:
    """What the backend calls the adapter: a name that means these weights and no others."""
    return f"{adapter.name}:{adapter.sha256[:12]}"


def _complete(
    adapter: AdapterRow,
    folder: Path,
    body: dict[str, Any],
    store: Store,
    backend: InferenceBackend,
) -> dict[str, Any]:
    """The backend's answer; loads the adapter when it is new, or has been unloaded meanwhile."""
    ready = adapter.status == "ready"
    for _ in range(TRIES):
        try:
            if not ready:
                _make_ready(adapter, folder, body, store, backend)
            return backend.complete(_path(body), body)
        except NotLoaded:
            ready = False
    raise ApiError(
        503,
        "inference_busy",
        f"adapter {adapter.name} was loaded {TRIES} times and was unloaded each time before it "
        "could answer: more adapters or base models are asked for at the same time than inference "
        "keeps. Try again, or raise BRIDGE_INFERENCE_MAX_ADAPTERS or BRIDGE_INFERENCE_MAX_MODELS",
        headers={"Retry-After": "2"},
    )


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
            outside=f"{model} cannot be had now; see the service's log" if status == 503 else None,
        ) from None
    content = _as_given(request)
    body = {**_sampling(request), **content, "model": model}
    try:
        answer = backend.complete(_path(body), body)
    except NotLoaded as error:
        raise ApiError(502, "inference_failed", error.message, param="model") from error
    return _generation(answer, model, None)


def _make_ready(
    adapter: AdapterRow,
    folder: Path,
    body: dict[str, Any],
    store: Store,
    backend: InferenceBackend,
) -> None:
    """Loads the adapter and has it write a few tokens. What it cannot do is noted in the registry.

    The canary continues the request's own prompt: every tokenizer is sure to know it. Raises
    NotLoaded if the adapter was unloaded in between: that is not its own fault.
    """
    try:
        check_weights(adapter, folder)
        backend.load(loaded_name(adapter), folder, adapter.base_model)
    except (Damaged, LoadFailed) as error:
        raise _not_servable(adapter, error.message, store) from error
    asked = {name: body[name] for name in body.keys() & {"model", "prompt", "messages"}}
    canary = {**asked, "max_tokens": CANARY_TOKENS, "temperature": 0.0}
    try:
        backend.complete(_path(canary), canary)
    except ApiError as error:
        if error.code == "inference_failed":
            raise _not_servable(adapter, error.detail, store) from error
        raise  # too busy, or the prompt's own fault: says nothing about the adapter
    if adapter.status != "ready":
        store.mark_adapter(adapter.name, "ready")


def _not_servable(adapter: AdapterRow, reason: str, store: Store) -> ApiError:
    log.error("adapter %s cannot be served: %s", adapter.name, reason)
    store.mark_adapter(adapter.name, "failed", reason)
    return ApiError(
        502,
        "adapter_failed",
        f"adapter {adapter.name} cannot be served: {reason}",
        param="adapter",
        given=adapter.name,
        outside=f"adapter {adapter.name} cannot be served; the service's log says why",
    )


def _as_given(request: GenerateRequest) -> dict[str, Any]:
    if request.messages is not None:
        return {"messages": [message.model_dump() for message in request.messages]}
    return {"prompt": request.prompt}


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


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
