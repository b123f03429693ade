"""A private vLLM server behind the same interface as the local process.

It serves the one base model it was started with, under the name that jobs give it
(`--served-model-name`), and adapters that are loaded while it runs. Three things of vLLM's own are
kept away from whoever asks us:

- A name that is used again answers from the prefix cache of the old weights. Ours never are: a name
  holds the digest of its weights.
- What a request leaves open comes from the model's generation config (Qwen's have a repetition
  penalty and a top_k). So everything is said.
- It keeps every adapter it was ever told of. The least recently used are unloaded here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ApiError
from service.generate.answers import AnswerStream, copied
from service.generate.backend import LOADED_NAME, InferenceBackend, LoadFailed, Reply
from service.generate.prompting import TODAY
from service.store import AdapterRow

QUIET_SECONDS = 30.0
"""So long nobody but the controller asks a server that has kept us waiting what it serves; longer
than the controller takes to come back."""
_PATIENCE_SECONDS = 1.0
AWAY = (429, 503, 504)
"""What is tried again once the server is back."""
_SAID: dict[str, Any] = {
    "max_tokens": 256,  # or what the context leaves: vLLM sees to that
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(eq=False)
class _Look:
    """A look at what is loaded, on its way."""

    changed: set[str] = field(default_factory=set)
    """Names that were loaded or unloaded since it was sent: it may be right about them or not."""


class VllmBackend(InferenceBackend):
    """A client of one vLLM server (its HTTP routes as of vLLM 0.32)."""

    start_it = "start vLLM there"
    look_seconds = 5.0
    needs_ends = True

    def __init__(self, url: str, api_key: str = "", most: int = 32, dtype: str = "") -> None:
        """`most`: adapters that stay loaded. `dtype`: what it was started with."""
        super().__init__(url, api_key)
        self._most = most
        self.dtype = dtype
        self._bases: dict[str, Any] | None = None
        """Its base model's names, and the folder (or hub's name) behind each."""
        self._quiet_until = 0.0
        self._used: OrderedDict[str, None] = OrderedDict()
        """Adapters that it should have, the one used last at the end."""
        self._lost: set[str] = set()
        """Those of them that it had before it was restarted."""
        self._away = False
        """It could not be reached since the last look."""
        self._looks: set[_Look] = set()
        self._room = asyncio.Lock()
        """Held from making room to having loaded, or two would take the same room."""
        self._dated = True
        """Does its tokenizer let a request say which day it is?"""

    # ------------------------------------------------------------------ what it has

    async def bases(self) -> list[str] | None:
        """The names it serves its base model under, as it said last."""
        if self._bases is None:
            if time.monotonic() < self._quiet_until:
                raise self._silent()
            await self.loaded()
        return list(self._bases or ())

    def lost(self) -> list[str]:
        """Those that were asked for, have not made room, and went when it was restarted. One that
        is missing while others are there was not lost: another copy of this service let it make
        room, and would do so again."""
        return [name for name in self._used if name in self._lost]

    async def loaded(self) -> list[dict[str, Any]]:
        """Cards of its base model's names and of its adapters; those that it got from another copy
        of this service are taken over, as used before all others."""
        look, began = _Look(), time.monotonic()
        self._looks.add(look)
        try:
            cards = await super().loaded()
        except ApiError:
            if time.monotonic() - began > _PATIENCE_SECONDS:
                self._quiet_until = time.monotonic() + QUIET_SECONDS
            raise
        finally:
            self._looks.discard(look)
        self._quiet_until = 0.0
        bases = {str(card["id"]): card.get("root") for card in cards if not card.get("parent")}
        if bases != self._bases:
            self.proved.clear()
            self._bases = bases
        here = [str(card["id"]) for card in cards if card.get("parent")]
        self._compare([name for name in here if LOADED_NAME.fullmatch(name)], look.changed)
        return cards

    def _compare(self, here: list[str], changed: set[str]) -> None:
        """What is expected with what is `here`, but for names that have `changed` meanwhile."""
        missing = [name for name in self._used if name not in here and name not in changed]
        if self._away or not here:
            self._lost.update(missing)
        for name in missing:
            self.proved.discard(name)
            if name not in self._lost:
                del self._used[name]
        self._away = False
        for name in here:
            if name not in changed:
                self._lost.discard(name)
                if name not in self._used:
                    self._used[name] = None
                    self._used.move_to_end(name, last=False)

    def _was_away(self) -> None:
        super()._was_away()
        self._away = True

    def _changed(self, name: str) -> None:
        for look in self._looks:
            look.changed.add(name)

    def name_of(self, adapter: AdapterRow) -> str:
        """What it calls the adapter. A whole model has the name its server was started with."""
        return adapter.name if adapter.is_model else super().name_of(adapter)

    def ending(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """Training may have sampled until tokens that the base's own files do not name."""
        ends = card.get("end_tokens")
        return {"stop_token_ids": ends} if isinstance(ends, list) and ends else {}

    # ------------------------------------------------------------------ adapters

    async def load(self, name: str, folder: Path, adapter: AdapterRow) -> None:
        """Loads an adapter and lets the least recently used make room, but for pinned ones. vLLM
        lets go of a name alone: requests that run by it end as they began."""
        async with self._room:
            await self.loaded()
            self._used[name] = None
            self._used.move_to_end(name)
            self._changed(name)
            try:
                idle = [one for one in self._used if one != name and one not in self.pinned]
                for oldest in idle[: max(0, len(self._used) - self._most)]:
                    await self.unload(oldest)
                await super().load(name, folder, adapter)
            except BaseException as error:
                if getattr(error, "status", None) not in AWAY:
                    self._forget(name)
                raise
            self._lost.discard(name)
            self._used[name] = None  # again: who looked in between did not see it
            self._changed(name)

    async def unload(self, name: str) -> None:
        """Drops an adapter; one that is not there is no error."""
        self._forget(name)
        await super().unload(name)
        self._forget(name)  # again: who looked in between saw it still

    def _forget(self, name: str) -> None:
        self._used.pop(name, None)
        self._lost.discard(name)
        self._changed(name)

    def _not_loaded(self, reply: Reply, message: str, adapter: AdapterRow) -> None:
        if "max_lora_rank" in message:
            raise ApiError(
                409,
                "adapter_rank_too_large",
                f"adapter {adapter.name} has rank {adapter.rank}, and the vLLM server that serves "
                f"{adapter.base_model} takes less ({message}); start it with --max-lora-rank "
                f"{adapter.rank} or more",
                param="adapter",
                given=adapter.name,
            )
        if reply.status == 404 and "adapter" in message.lower():
            raise self._misconfigured(
                f"does not find {adapter.name} ({message}): the folder must be the same path on "
                "its machine"
            )
        if reply.status in (404, 405) or "enable_lora" in message or "not enabled" in message:
            raise self._misconfigured(
                "loads no adapters: start it with --enable-lora and, in its environment, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if reply.status == 500 and "EngineCore" not in message:
            raise LoadFailed(message)  # the engine's word on the adapter
        super()._not_loaded(reply, message, adapter)

    # ------------------------------------------------------------------ asking it

    async def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions or /v1/chat/completions; raises `NotLoaded`."""
        asked, copies = self._asked(body)
        try:
            return copied(await super().complete(path, asked), copies)
        except ApiError as error:
            if not self._wants_no_date(asked, error):
                raise
        return await self.complete(path, body)

    async def stream(self, path: str, body: dict[str, Any]) -> AnswerStream:
        """The same as it is written."""
        asked, copies = self._asked(body)
        try:
            opened = await super().stream(path, asked)
        except ApiError as error:
            if not self._wants_no_date(asked, error):
                raise
            return await self.stream(path, body)
        opened.copies = copies
        return opened

    def _asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The request with all that it leaves open; and how often each choice of its answer stands
        for itself: vLLM writes one where all would be the same, and refuses to write more."""
        if body["model"] in self._used:
            self._used.move_to_end(body["model"])
        asked = {**_SAID, **body}
        if (stop := asked.get("stop")) is not None:  # an empty one stops nothing; vLLM refuses it
            asked["stop"] = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        if "messages" in asked and self._dated:
            asked["chat_template_kwargs"] = {"date_string": TODAY}
        if asked["temperature"] != 0:
            return asked, 1
        return asked, asked.pop("n", None) or 1

    def _wants_no_date(self, asked: Mapping[str, Any], error: ApiError) -> bool:
        """Mistral's own tokenizer has no template, and refuses what is said to one."""
        if "chat_template_kwargs" not in asked or "Mistral tokenizers" not in error.detail:
            return False
        self._dated = False
        return True

    # ------------------------------------------------------------------ errors

    def _failed(self, reply: Reply, message: str) -> ApiError:
        if reply.status in (401, 403):
            return self._misconfigured(
                "refuses us: BRIDGE_INFERENCE_API_KEY must be what it was given as --api-key"
            )
        return super()._failed(reply, message)

    def _misconfigured(self, what: str) -> ApiError:
        return ApiError(
            502,
            "inference_misconfigured",
            f"the vLLM server at {self.url} {what}",
            outside="the vLLM server is not set up for this; the service's log says how to",
        )
