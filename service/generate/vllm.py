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

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from service.errors import ApiError
from service.generate.backend import InferenceBackend, LoadFailed
from service.store import AdapterRow

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

AWAY = (429, 503, 504)
"""What is tried again once the server is back."""


class VllmBackend(InferenceBackend):
    """A client of one vLLM server (its HTTP routes as of vLLM 0.32)."""

    start_it = "start vLLM there"

    def __init__(
        self,
        url: str,
        transport: httpx.AsyncBaseTransport | None = None,
        api_key: str = "",
        most: int = 32,
    ) -> None:
        """`most`: adapters that stay loaded."""
        super().__init__(url, transport, api_key)
        self._most = most
        self._bases: list[str] | None = None
        self._used: OrderedDict[str, None] = OrderedDict()
        """Adapters that it should have, the one used last at the end."""

    # ------------------------------------------------------------------ what it has

    async def bases(self) -> list[str] | None:
        """The names it serves its base model under, as it said last."""
        if self._bases is None:
            await self.loaded()
        return self._bases

    def kept(self) -> list[str]:
        """All that were asked for and have not made room since."""
        return list(self._used)

    async def loaded(self) -> list[dict[str, Any]]:
        """Cards of its base model's names and of its adapters; those that it got from another copy
        of this service are taken over, as used before all others."""
        cards = await super().loaded()
        self._bases = [str(card["id"]) for card in cards if not card.get("parent")]
        for card in cards:
            if "@" in card["id"] and card.get("parent") and card["id"] not in self._used:
                self._used[card["id"]] = None
                self._used.move_to_end(card["id"], last=False)
        return cards

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
        if adapter.is_model:
            return
        await self.loaded()
        self._used[name] = None  # at once: who loads another meanwhile must count it
        self._used.move_to_end(name)
        idle = [one for one in self._used if one != name and one not in self.pinned]
        for oldest in idle[: max(0, len(self._used) - self._most)]:
            await self.unload(oldest)
        try:
            await super().load(name, folder, adapter)
        except (ApiError, LoadFailed) as error:
            if getattr(error, "status", None) not in AWAY:
                self._used.pop(name, None)
            raise

    async def unload(self, name: str) -> None:
        """Drops an adapter; one that is not there is no error."""
        self._used.pop(name, None)
        await super().unload(name)

    def _not_loaded(self, response: httpx.Response, message: str, adapter: AdapterRow) -> None:
        status = response.status_code
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
        if status == 404 and "adapter" in message.lower():
            raise self._misconfigured(
                f"does not find {adapter.name} ({message}): the folder must be the same path on "
                "its machine"
            )
        if status in (404, 405) or "enable_lora" in message or "not enabled" in message:
            raise self._misconfigured(
                "loads no adapters: start it with --enable-lora and, in its environment, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if status == 500 and "EngineCore" not in message:
            raise LoadFailed(message)  # the engine's word on the adapter
        super()._not_loaded(response, message, adapter)

    # ------------------------------------------------------------------ asking it

    async def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions or /v1/chat/completions; raises `NotLoaded`."""
        return await super().complete(path, self._asked(body))

    async def stream(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The same as an open stream."""
        return await super().stream(path, self._asked(body))

    def _asked(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request with all that it leaves open."""
        if body["model"] in self._used:
            self._used.move_to_end(body["model"])
        asked = {**_SAID, **body}
        if (stop := asked.get("stop")) is not None:  # an empty one stops nothing; vLLM refuses it
            asked["stop"] = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        return asked

    # ------------------------------------------------------------------ errors

    def _failed(self, response: httpx.Response, message: str) -> ApiError:
        if response.status_code in (401, 403):
            return self._misconfigured(
                "refuses us: BRIDGE_INFERENCE_API_KEY must be what it was given as --api-key"
            )
        return super()._failed(response, message)

    def _misconfigured(self, what: str) -> ApiError:
        return ApiError(
            502,
            "inference_misconfigured",
            f"the vLLM server at {self.url} {what}",
            outside="the vLLM server is not set up for this; the service's log says how to",
        )
