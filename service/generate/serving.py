"""From a name to a model that answers.

The database knows what exists, the backend what is loaded; either may be restarted, and the backend
may unload what it likes, at any time. An adapter is loaded when it is asked for and not there, and
asked only once its canary proved it: since it was loaded, and to this process. That it was `ready`
before says nothing about what is loaded now.

JOB@STEP is what people say, but not for ever the same bytes: a job that goes on from an earlier
checkpoint on another machine may save the step again with other last digits. So the backend knows
an adapter by JOB@STEP and its weights' digest; it can never answer from weights of the past.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from bridge_engine.errors import EngineError
from bridge_engine.models import catalog
from bridge_engine.spec.errors import nearest_name
from service.adapters.files import adapter_folder, check_weights, stored_file
from service.adapters.names import find_adapter, look_up, nearest, nearest_of, newest
from service.artifacts import Damaged
from service.errors import ApiError
from service.generate.answers import AnswerStream
from service.generate.backend import InferenceBackend, LoadFailed, NotLoaded
from service.generate.backends import Backends, Bases
from service.generate.canary import PATH, Canary
from service.generate.files import CARD, card_of, check_files, read_card
from service.generate.together import Together
from service.settings import Settings
from service.store import AdapterRow, NotFound, Store

log = logging.getLogger(__name__)

CANARY_TOKENS = 4
TRIES = 3
"""Times an adapter is loaded for one request, where it is unloaded again before it can answer."""
ENDS_SECONDS = 60.0
"""So long a base model of which no adapter says where answers end is not looked up again."""
_LISTED = 20
"""So many of the newest adapters are listed to somebody who named none."""

_LOOKED_AT = 200
"""Among so many of the newest adapters is looked for one of a base model."""

Answer = TypeVar("Answer")
Found = tuple[AdapterRow, Path | None, Mapping[str, Any]]
"""An adapter with its folder and its bridge.json."""


@dataclass(frozen=True)
class Target:
    """Who answers."""

    base_model: str
    server: InferenceBackend
    """Which serves it."""
    adapter: AdapterRow | None = None
    folder: Path | None = None
    """Where the adapter lies; None where nothing is loaded from there."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """The adapter's bridge.json; of a base model, one of an adapter that was trained on it."""

    @property
    def name(self) -> str:
        """The adapter's immutable name, or the base model's."""
        return self.adapter.name if self.adapter else self.base_model

    @property
    def backend_name(self) -> str:
        """What the backend calls it."""
        return self.server.name_of(self.adapter) if self.adapter else self.base_model


class Serving:
    """Answers by whatever model is named, and loads it first where it must be."""

    def __init__(self, store: Store, settings: Settings, backends: Backends) -> None:
        self.store, self.settings, self.backends = store, settings, backends
        self._looks: Together[Found | None] = Together()
        self._proving: dict[tuple[InferenceBackend, str], asyncio.Task[None]] = {}
        self._unpinned: set[str] = set()
        """Names that are to be pinned and mean nothing, at the last look."""
        self._model_cards: dict[str, Mapping[str, Any]] = {}
        """By the digest of a whole model that is not fetched."""
        self._base_cards: dict[str, tuple[float, Mapping[str, Any]]] = {}
        """By base model, with the time until which that is all that is known."""

    # ------------------------------------------------------------------ names

    async def target(self, adapter: str | None, model: str | None) -> Target:
        """The adapter or base model that is named; `model` may name either. Raises `ApiError`: 404
        with near names, 409 where the adapter belongs to another base than `model`."""
        bases = await self.backends.bases()
        # A base model that a server has needs no look at the database, nor a thread for one.
        plain = adapter is None and bases.names is not None and model in base_names(bases)
        found = None
        if not plain:
            look = partial(self._found, adapter, model, bases)
            found = await self._looks.find((adapter, model), look)
        if found is None:
            assert model is not None  # the schemas demand one of the two
            server = await self.backends.serving(model)
            return Target(model, server, card=await self._base_card(model, server))
        row, folder, card = found
        return Target(row.base_model, await self.server_of(row), row, folder, card)

    async def trained(self, row: AdapterRow) -> Target:
        """An adapter of the registry. Raises `ApiError` where no server can serve it."""
        files = await run_in_threadpool(self._files, row)
        return Target(row.base_model, await self.server_of(row), row, *files)

    async def server_of(self, row: AdapterRow) -> InferenceBackend:
        """Who serves it. Raises `ApiError`: 409 where nobody does, 503 where that is not known."""
        return await self.backends.serving(row.name if row.is_model else row.base_model)

    def _found(self, adapter: str | None, model: str | None, bases: Bases) -> Found | None:
        """The adapter with its files; None: a base model."""
        row = self._named(adapter, model, bases)
        return None if row is None else (row, *self._files(row))

    def _files(self, row: AdapterRow) -> tuple[Path | None, Mapping[str, Any]]:
        """The adapter's folder and its bridge.json."""
        try:
            if row.is_model and self.settings.inference_backend == "vllm":
                return None, self._model_card(row)  # its server was started with it
            folder = adapter_folder(row, self.store, self.settings)
        except Damaged as error:
            raise self._not_servable(row, error.message) from error
        return folder, card_of(folder)

    def _model_card(self, row: AdapterRow) -> Mapping[str, Any]:
        """A whole model's bridge.json, without its gigabytes."""
        if (card := self._model_cards.get(row.sha256)) is None:
            card = read_card(stored_file(row, CARD, self.store, self.settings))
            if card:
                self._model_cards[row.sha256] = card
        return card

    async def _base_card(self, model: str, server: InferenceBackend) -> Mapping[str, Any]:
        """What adapters of the base model know about it, for a server that must be told."""
        if not server.needs_ends:
            return {}
        until, card = self._base_cards.get(model, (0.0, {}))
        if until < time.monotonic():
            card = await run_in_threadpool(self._card_on, model)
            until = math.inf if card else time.monotonic() + ENDS_SECONDS
            self._base_cards[model] = until, card
        return card

    def _card_on(self, model: str) -> Mapping[str, Any]:
        rows = self.store.adapters(limit=_LOOKED_AT)[0]
        for row in [row for row in rows if row.base_model == model][:_LISTED]:
            with contextlib.suppress(Damaged, ApiError):
                card = read_card(stored_file(row, CARD, self.store, self.settings))
                if card.get("end_tokens"):
                    return card
        return {}

    def _named(self, adapter: str | None, model: str | None, bases: Bases) -> AdapterRow | None:
        """None: a base model."""
        if adapter is None:
            assert model is not None
            row = self._adapter_called(model, bases)
            if row is None and bases.names is None:
                _check_base(model)
            return row
        if adapter in {*base_names(bases), *catalog.model_names()}:
            raise ApiError(
                404,
                "unknown_adapter",
                f"{adapter!r} is a base model and no adapter; name it as `model`",
                param="adapter",
                given=adapter,
            )
        row = find_adapter(self.store, adapter)
        if model is not None and model != row.base_model:
            raise ApiError(
                409,
                "base_model_mismatch",
                f"adapter {row.name} was trained on {row.base_model}, not on {model}; leave "
                "model out, or name that one",
                param="model",
                given=model,
                allowed=[row.base_model],
            )
        return row

    def _adapter_called(self, model: str, bases: Bases) -> AdapterRow | None:
        """The adapter a request's `model` names, None for a base model; 404 for neither."""
        models = base_names(bases)
        if model in {*models, *catalog.model_names()} or "/" in model:  # the hub's, or a server's
            return None
        try:
            return look_up(self.store, model)
        except NotFound as error:
            if bases.trouble is not None:  # it may be a base model there
                raise bases.trouble from None
            adapters = newest(self.store)
            near = nearest_of(model, [*models, *adapters])
            hint = f"; did you mean {near!r}?" if near else ""
            raise ApiError(
                404,
                "unknown_model",
                f"{model!r} is neither a base model ({', '.join(models)}, or owner/name on the "
                f"Hugging Face hub) nor an adapter ({error.message}){hint}",
                param="model",
                given=model,
                allowed=[*models, *adapters[:_LISTED]],
                nearest=near,
            ) from None

    async def pinned(self) -> list[AdapterRow]:
        """The adapters that shall always be loaded, as far as there are such."""
        found = []
        for name in self.settings.inference_pinned:
            try:
                found.append(await run_in_threadpool(look_up, self.store, name))
                self._unpinned.discard(name)
            except NotFound as error:
                if name not in self._unpinned:  # told once, not at each look
                    self._unpinned.add(name)
                    near = await run_in_threadpool(nearest, self.store, name)
                    hint = f"; did you mean {near!r}?" if near else ""
                    log.warning("BRIDGE_INFERENCE_PINNED: %s%s", error.message, hint)
        return found

    # ------------------------------------------------------------------ answers

    async def complete(self, target: Target, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The backend's whole answer."""
        return await self._ask(target, path, body, target.server.complete)

    async def stream(self, target: Target, path: str, body: dict[str, Any]) -> AnswerStream:
        """The backend's answer as it is written."""
        return await self._ask(target, path, body, target.server.stream)

    async def restore(self, target: Target) -> None:
        """Loads an adapter, and proves it, before anybody asks for it."""
        await self._proved(target, PATH, {"model": target.backend_name, "prompt": "1"})

    async def _ask(
        self,
        target: Target,
        path: str,
        body: dict[str, Any],
        send: Callable[[str, dict[str, Any]], Awaitable[Answer]],
    ) -> Answer:
        """Loads and proves the adapter when it is new, or has been unloaded meanwhile."""
        body = {**body, **target.server.ending(target.card), "model": target.backend_name}
        if target.adapter is None:
            try:
                return await send(path, body)
            except NotLoaded as error:
                raise ApiError(502, "inference_failed", error.message, param="model") from error
        proved = target.server.proved
        for _ in range(TRIES):
            try:
                if target.backend_name not in proved:
                    await self._proved(target, path, body)
                return await send(path, body)
            except NotLoaded:
                proved.discard(target.backend_name)
        raise ApiError(
            503,
            "inference_busy",
            f"adapter {target.name} was loaded {TRIES} times and was unloaded each time before it "
            "could answer: more adapters or base models are asked for at the same time than "
            "inference keeps. Try again, or raise BRIDGE_INFERENCE_MAX_ADAPTERS or "
            "BRIDGE_INFERENCE_MAX_MODELS",
            headers={"Retry-After": "2"},
        )

    async def _proved(self, target: Target, path: str, body: dict[str, Any]) -> None:
        """Once the adapter is loaded and its canary has answered. Those who ask for it meanwhile
        wait for the same, which goes on when they hang up."""
        key = (target.server, target.backend_name)
        task = self._proving.get(key)
        if task is None:
            task = self._proving[key] = asyncio.create_task(self._prove(target, path, body))
            task.add_done_callback(lambda _: self._proving.pop(key, None))
            await asyncio.shield(task)
            return
        try:
            await asyncio.shield(task)
        except ApiError as error:
            if error.code == "cannot_generate":  # the fault of the other's prompt
                raise NotLoaded(error.detail) from error
            raise

    async def _prove(self, target: Target, path: str, body: dict[str, Any]) -> None:
        """Loads the adapter and compares it with its export. What it cannot do is noted in the
        registry; what the server cannot do just now is not.

        An adapter whose export noted no figures must write a few tokens behind the request's own
        prompt, which every tokenizer is sure to know. Raises NotLoaded if it was unloaded in
        between: that is not its own fault.
        """
        adapter, server, name = target.adapter, target.server, target.backend_name
        assert adapter is not None
        server.proved.discard(name)
        if target.folder is not None:
            try:
                await run_in_threadpool(_check_files, adapter, target.folder)
                await server.load(name, target.folder, adapter)
            except LoadFailed as error:
                raise await run_in_threadpool(self._not_servable, adapter, error.message) from error
        canary = Canary.of(target.card, server.dtype)
        try:
            if canary is not None:
                canary.compare(await server.complete(PATH, canary.request(name)))
            else:
                asked = {key: body[key] for key in body.keys() & {"model", "prompt", "messages"}}
                asked |= {"max_tokens": CANARY_TOKENS, "temperature": 0.0}
                await server.complete(path, asked)
        except ValueError as error:
            refused = await run_in_threadpool(self._not_servable, adapter, str(error))
            with contextlib.suppress(ApiError):  # it is not asked even if it stays
                await server.unload(name)
            raise refused from error
        except ApiError as error:
            if canary is None or error.code != "cannot_generate":
                raise  # too busy, fallen over, the prompt's own fault: says nothing about it
            raise await run_in_threadpool(self._not_servable, adapter, error.detail) from error
        server.proved.add(name)
        if adapter.status != "ready":
            await run_in_threadpool(self.store.mark_adapter, adapter, "ready")

    def _not_servable(self, adapter: AdapterRow, reason: str) -> ApiError:
        log.error("adapter %s cannot be served: %s", adapter.name, reason)
        self.store.mark_adapter(adapter, "failed", reason)
        return ApiError(
            502,
            "adapter_failed",
            f"adapter {adapter.name} cannot be served: {reason}",
            param="adapter",
            given=adapter.name,
            outside=f"adapter {adapter.name} cannot be served; the service's log says why",
        )


def base_names(bases: Bases) -> list[str]:
    """The base models that may be named: whole models that were trained are in the registry."""
    if bases.names is None:
        return catalog.model_names()
    return [name for name in bases.names if "@" not in name]


def _check_base(model: str) -> None:
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
            headers={"Retry-After": "30"} if status == 503 else None,
            outside=f"{model} cannot be had now; see the service's log" if status == 503 else None,
        ) from None


def _check_files(adapter: AdapterRow, folder: Path) -> None:
    """Are they still those that were registered?"""
    try:
        check_weights(adapter, folder)
        check_files(adapter, folder)
    except Damaged as error:
        raise LoadFailed(error.message) from error
    except ValueError as error:
        raise LoadFailed(str(error)) from error
