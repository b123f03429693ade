"""Keeps inference to the registry, at the start, on a change, and now and then.

What a server has loaded and the registry does not know any more (deleted, or saved again with other
bytes) is dropped. What it should have and has not is loaded: pinned adapters, and on a vLLM server,
which may have been restarted, those that were asked for. Others come back as they are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from service.errors import ApiError
from service.generate.backend import InferenceBackend, NotLoaded, loaded_name
from service.generate.serving import Serving, Target
from service.generate.vllm import AWAY
from service.store import Store, StoreUnavailable

EVERY_SECONDS = 15.0
_SAMPLING = re.compile(r"bridge-\w{12}-step-\d+-\d+")
log = logging.getLogger(__name__)


class Controller:
    """Runs as a task on the event loop."""

    def __init__(self, store: Store, serving: Serving) -> None:
        self._store, self._serving = store, serving
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def changed(self) -> None:
        """The registry has changed: looks soon. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        """Until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                await self.reconcile()
            except StoreUnavailable as error:
                log.debug("not reconciled: %s", error)
            except Exception:
                log.exception("inference could not be reconciled with the registry")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), EVERY_SECONDS)
            self._changed.clear()

    async def reconcile(self) -> list[str]:
        """Returns the servers' names of what was dropped."""
        pinned = []
        for row in await self._serving.pinned():
            with contextlib.suppress(ApiError):
                pinned.append(await self._serving.trained(row))
        dropped: list[str] = []
        for server in self._serving.backends.servers:
            try:
                dropped += await self._reconcile(server, [t for t in pinned if t.server is server])
            except ApiError as error:
                log.debug("%s is not reconciled: %s", server.url, error)
        return dropped

    async def _reconcile(self, server: InferenceBackend, pinned: Sequence[Target]) -> list[str]:
        server.pinned = frozenset(target.backend_name for target in pinned)
        loaded = {str(card["id"]): card for card in await server.loaded() if _is_ours(card)}
        wanted = dict.fromkeys([*server.kept(), *loaded])
        names = [name.rpartition(":")[0] for name in wanted]
        rows = await run_in_threadpool(self._store.adapters_named, names)
        known = {loaded_name(row): row for row in rows}
        stale = [name for name in wanted if name not in known]
        for name in stale:
            log.info("inference drops %s, which is not in the registry", name)
            await server.unload(name)
        for target in pinned:
            # Of the local process one may be loaded and not be pinned yet.
            if not loaded.get(target.backend_name, {"pinned": False}).get("pinned", True):
                await self._restore(target)
        for name in server.kept():
            if name not in loaded and name in known and name not in server.pinned:
                await self._restore(await self._serving.trained(known[name]))
        return stale

    async def _restore(self, target: Target) -> None:
        try:
            await self._serving.restore(target)
        except NotLoaded as error:
            log.info("%s made room for others at once: %s", target.name, error.message)
        except ApiError as error:
            if error.status in AWAY:
                raise  # for the next look
            log.warning("%s is not loaded again: %s", target.name, error.detail)


def _is_ours(card: dict[str, Any]) -> bool:
    """Is it an adapter, or one of the models that were trained? Not a base model; nor an adapter of
    a run that samples by the same vLLM server (docs/vllm.md), which is nobody's to answer by."""
    name = str(card["id"])
    trained = "@" in name and ":" in name
    return trained or bool(card.get("parent") and not _SAMPLING.fullmatch(name))
