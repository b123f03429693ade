"""Keeps the backend to the registry: what it has loaded and the registry does not know any more
(deleted, or saved again with other bytes) is dropped, at the start, on a change, and now and then.

Nothing is loaded here: a backend that was restarted gets its adapters back as they are asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.concurrency import run_in_threadpool

from service.errors import ApiError
from service.generate.backend import InferenceBackend
from service.generate.serving import loaded_name
from service.store import Store, StoreUnavailable

EVERY_SECONDS = 15.0
log = logging.getLogger(__name__)


class Controller:
    """Runs as a task on the event loop."""

    def __init__(self, store: Store, backend: InferenceBackend) -> None:
        self._store, self._backend = store, backend
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """The registry has changed: looks soon. To be called on the event loop."""
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.reconcile()
            except (ApiError, StoreUnavailable) as error:
                log.debug("not reconciled: %s", error)
            except Exception:
                log.exception("inference could not be reconciled with the registry")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), EVERY_SECONDS)
            self._changed.clear()

    async def reconcile(self) -> list[str]:
        """Drops what the registry does not know; returns the backend's names of it."""
        cards = await self._backend.loaded()
        loaded = [str(card["id"]) for card in cards if card.get("parent")]
        names = [name.rpartition(":")[0] for name in loaded]
        rows = await run_in_threadpool(self._store.adapters_named, names)
        known = {loaded_name(row) for row in rows}
        stale = [name for name in loaded if name not in known]
        for name in stale:
            log.info("inference drops %s, which is not in the registry", name)
            await self._backend.unload(name)
        return stale
