"""Keeps inference to the registry, at the start, on a change, and now and then.

What a server has loaded and the registry does not know any more (deleted, or saved again with other
bytes) is dropped. What it should have and has not is loaded: pinned adapters, and on a vLLM server
that was restarted, those that it had. Others come back as they are asked for. Each server is looked
after by a task of its own: one that hangs keeps no other waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool

from service.errors import ApiError
from service.generate.backend import LOADED_NAME, InferenceBackend, NotLoaded, loaded_name
from service.generate.serving import Serving
from service.store import AdapterRow, Store, StoreUnavailable

EVERY_SECONDS = 15.0
log = logging.getLogger(__name__)


class Controller:
    """Runs as a task on the event loop."""

    def __init__(self, store: Store, serving: Serving) -> None:
        self._store, self._serving = store, serving
        self._changed = {server: asyncio.Event() for server in serving.backends.servers}
        self._loop: asyncio.AbstractEventLoop | None = None

    def changed(self) -> None:
        """The registry has changed: looks soon. From any thread."""
        if self._loop is not None:
            for changed in self._changed.values():
                self._loop.call_soon_threadsafe(changed.set)

    async def run(self) -> None:
        """Until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        settings = self._serving.settings
        if len(settings.inference_pinned) >= settings.inference_max_adapters:
            log.warning(
                "BRIDGE_INFERENCE_PINNED names %d adapters, and inference keeps %d: there may be "
                "no room for any other. Raise BRIDGE_INFERENCE_MAX_ADAPTERS",
                len(settings.inference_pinned),
                settings.inference_max_adapters,
            )
        async with asyncio.TaskGroup() as group:
            for server, changed in self._changed.items():
                group.create_task(self._watch(server, changed))

    async def _watch(self, server: InferenceBackend, changed: asyncio.Event) -> None:
        while True:
            try:
                await self._reconcile(server)
            except StoreUnavailable as error:
                log.debug("not reconciled: %s", error)
            except Exception:
                log.exception("%s could not be reconciled with the registry", server.url)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), EVERY_SECONDS)
            changed.clear()

    async def reconcile(self) -> list[str]:
        """Looks at every server once; returns their names of what was dropped."""
        dropped = await asyncio.gather(*map(self._reconcile, self._changed))
        return [name for names in dropped for name in names]

    async def _reconcile(self, server: InferenceBackend) -> list[str]:
        dropped: list[str] = []
        try:
            pinned = {server.name_of(row): row for row in await self._serving.pinned()}
            server.pinned = frozenset(pinned)
            cards = {str(card["id"]): card for card in await server.loaded()}
            ours = [name for name in cards if LOADED_NAME.fullmatch(name)]  # others are not
            known = await self._known([*server.lost(), *ours])
            for name in dict.fromkeys([*server.lost(), *ours]):
                if name not in known:
                    log.info("inference drops %s, which is not in the registry", name)
                    await server.unload(name)
                    dropped.append(name)
            # Of the local process one may be loaded and be pinned no more, or not yet.
            freed = [name for name in ours if cards[name].get("pinned") and name not in pinned]
            held = {name for name, card in cards.items() if card.get("pinned", True)}
            again = [known[name] for name in freed if name in known]
            again += [row for name, row in pinned.items() if name not in held]
            again += [known[name] for name in server.lost() if name in known.keys() - pinned]
            for row in again:
                await self._load(server, row)
        except ApiError as error:
            log.debug("%s is not reconciled: %s", server.url, error)
        return dropped

    async def _known(self, names: Sequence[str]) -> dict[str, AdapterRow]:
        """Those that the registry has, with just these weights."""
        bare = [name.rpartition(":")[0] for name in names]
        rows = await run_in_threadpool(self._store.adapters_named, bare)
        return {loaded_name(row): row for row in rows}

    async def _load(self, server: InferenceBackend, row: AdapterRow) -> None:
        """Loads an adapter as it shall be now, if it is this server's."""
        try:
            if await self._serving.server_of(row) is server:
                await self._serving.restore(await self._serving.trained(row))
        except NotLoaded as error:
            log.info("%s made room for others at once: %s", row.name, error.message)
        except ApiError as error:
            if error.code == "inference_unreachable":
                raise  # nor would the others be loaded: for the next look
            log.warning("%s is not loaded: %s", row.name, error.detail)
