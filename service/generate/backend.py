"""An inference server as the service speaks to it: vLLM's routes over HTTP.

What is here fits the local process (`python -m inference`); `vllm` has what is different of a vLLM
server. Only these few routes are ever asked for: what else a server offers is out of reach of
whoever asks us. Every failure comes out as an `ApiError` that says whose it is: not reachable
(503), too busy (429), the request's own fault (404, 422), or the backend's (502, 504).
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from service.errors import ApiError
from service.store import AdapterRow

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 290.0
"""Loading a model the first time and a long generation both fit in; a little less than the client
waits, so that it hears why. Of a stream: the longest silence."""


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LOAD_MODEL = "/v1/load_model"
"""The local process's own."""


class NotLoaded(Exception):
    """The backend does not know the model's or adapter's name (any more)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class LoadFailed(Exception):
    """The backend refused to load an adapter; the message is its reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def loaded_name(adapter: AdapterRow) -> str:
    """A name for the adapter that means these weights and no others, for ever."""
    return f"{adapter.name}:{adapter.sha256[:12]}"


class InferenceBackend:
    """A client of one inference server. Waiting for it costs no thread."""

    start_it = "start it with `python -m inference`"

    def __init__(
        self, url: str, transport: httpx.AsyncBaseTransport | None = None, api_key: str = ""
    ) -> None:
        self.url = url
        self.pinned: frozenset[str] = frozenset()
        """Names of adapters that never make room for others."""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._transport = transport
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def _http(self) -> httpx.AsyncClient:
        """The running event loop's own client: connections cannot be shared between loops."""
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is None:
            client = self._clients[loop] = httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                # A loopback address must never be sent through a proxy of the environment.
                trust_env=False,
                transport=self._transport,
            )
        return client

    async def close(self) -> None:
        """Closes the connections that the running event loop keeps open."""
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Does it answer?"""
        try:
            return (await self._http.get("/health", timeout=CONNECT_SECONDS)).is_success
        except httpx.HTTPError:
            return False

    async def bases(self) -> list[str] | None:
        """The base models it serves; None: every one that the catalog knows."""
        return None

    def name_of(self, adapter: AdapterRow) -> str:
        """What it calls the adapter: a name that means these weights and no others."""
        return loaded_name(adapter)

    def ending(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """How it is told where answers end, from the adapter's bridge.json. The local process reads
        that off the base model, as training did."""
        return {}

    def kept(self) -> list[str]:
        """Adapters that it should have, because they were asked for; it may have been restarted
        since. The local process decides for itself what it keeps."""
        return []

    async def loaded(self) -> list[dict[str, Any]]:
        """OpenAI's card of every base model and adapter that is loaded; `ApiError` if it cannot
        say."""
        response = await self._send("GET", "/v1/models")
        if not response.is_success:
            raise self._failed(response, _reason(response)[0])
        cards: list[dict[str, Any]] = response.json()["data"]
        return cards

    async def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions or /v1/chat/completions; raises `NotLoaded`."""
        response = await self._send("POST", path, body)
        self._check(response)
        answer: dict[str, Any] = response.json()
        _check_ends(answer)
        return answer

    async def stream(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The same as an open stream, for `pieces`; to be closed with `aclose`."""
        response = await self._send("POST", path, {**body, "stream": True}, stream=True)
        if not response.is_success:
            try:
                await response.aread()
            finally:
                await response.aclose()
        self._check(response)
        return response

    async def load(self, name: str, folder: Path, adapter: AdapterRow) -> None:
        """Loads an adapter or a whole model under its immutable name; raises `LoadFailed` with the
        reason."""
        if adapter.is_model:
            await self._load(LOAD_MODEL, {"name": name, "path": str(folder)}, adapter)
            return
        body = {
            "lora_name": name,
            "lora_path": str(folder),
            "base_model": adapter.base_model,
            "sha256": adapter.sha256,
            "pinned": name in self.pinned,
        }
        await self._load(LOAD, body, adapter)

    async def _load(self, path: str, body: dict[str, Any], adapter: AdapterRow) -> None:
        response = await self._send("POST", path, body)
        if not response.is_success:
            self._not_loaded(response, _reason(response)[0], adapter)

    def _not_loaded(self, response: httpx.Response, message: str, adapter: AdapterRow) -> None:
        """Raises what the refusal to load an adapter means, unless it is loaded already: perhaps
        from another copy, but the name has the weights' digest."""
        if response.status_code == 400 and "already" in message and "loaded" in message:
            return
        if response.status_code in (400, 404, 422):
            raise LoadFailed(message)
        raise self._failed(response, message)

    async def unload(self, name: str) -> None:
        """Drops an adapter; one that is not there is no error."""
        response = await self._send("POST", UNLOAD, {"lora_name": name})
        if not response.is_success and response.status_code != 404:
            raise self._failed(response, _reason(response)[0])

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        message, param = _reason(response)
        if response.status_code == 404:
            raise NotLoaded(message)
        if response.status_code in (400, 413, 422):
            raise ApiError(422, "cannot_generate", message, param=param)
        raise self._failed(response, message)

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, stream: bool = False
    ) -> httpx.Response:
        request = self._http.build_request(method, path, json=body)
        try:
            return await self._http.send(request, stream=stream)
        except httpx.ReadTimeout as error:
            raise ApiError(
                504,
                "inference_timeout",
                f"inference did not answer within {ANSWER_SECONDS:.0f} s; ask for fewer tokens",
            ) from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> ApiError:
        return ApiError(
            503,
            "inference_unreachable",
            f"the inference server at {self.url} cannot be reached "
            f"({str(error) or type(error).__name__}); {self.start_it}, or "
            "say where it is with BRIDGE_INFERENCE_URL. Training goes on without it",
            headers={"Retry-After": "5"},
            outside="inference cannot be reached now; training goes on without it",
        )

    def _failed(self, response: httpx.Response, message: str) -> ApiError:
        if response.status_code in (429, 503):
            status = response.status_code
            after = response.headers.get("retry-after", "2")
            return ApiError(status, "inference_busy", message, headers={"Retry-After": after})
        return ApiError(502, "inference_failed", f"inference failed: {message}")


async def pieces(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of an open stream up to its end. Raises `ApiError` where it breaks off: nobody may
    take what came for a whole answer."""
    try:
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == "[DONE]":
                return
            if not data:
                continue
            chunk: dict[str, Any] = json.loads(data)
            if "error" in chunk:
                message = str((chunk["error"] or {}).get("message"))
                raise ApiError(502, "inference_failed", f"inference failed: {message}")
            _check_ends(chunk)
            yield chunk
    except (httpx.HTTPError, ValueError) as error:
        raise _broken(str(error) or type(error).__name__) from error
    raise _broken("the stream ended early")


def _check_ends(answer: Mapping[str, Any]) -> None:
    """A choice that was given up (vLLM says `abort` where it is being stopped) is no answer."""
    for choice in answer.get("choices") or ():
        if (reason := choice.get("finish_reason")) not in (None, "stop", "length"):
            raise _broken(f"it ended with {reason!r}")


def _broken(why: str) -> ApiError:
    return ApiError(
        502,
        "inference_interrupted",
        f"inference stopped in the middle of the answer ({why}); what came is not whole: ask again",
        headers={"Retry-After": "2"},
        outside="inference stopped in the middle of the answer; what came is not whole: ask again",
    )


def _reason(response: httpx.Response) -> tuple[str, str | None]:
    """The message and the field at fault, from the error shapes that vLLM has had."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:500] or f"HTTP status {response.status_code}", None
    error = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(error, dict):
        return str(error), None
    param = error.get("param")
    return str(error.get("message") or body), param if isinstance(param, str) else None
