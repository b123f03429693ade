"""The inference process as the service speaks to it: vLLM's routes over HTTP.

Every failure comes out as an `ApiError` that says whose it is: not reachable (503), too busy (429),
the request's own fault (404, 422), or the backend's (502, 504).
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from service.errors import ApiError

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 290.0
"""Loading a model the first time and a long generation both fit in; a little less than the client
waits, so that it hears why. Of a stream: the longest silence."""


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


class InferenceBackend:
    """A client of one inference server. Waiting for it costs no thread."""

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
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

    async def load(self, name: str, path: Path, base_model: str, sha256: str) -> None:
        """Loads an adapter under its immutable name; raises `LoadFailed` with the reason."""
        body = {
            "lora_name": name,
            "lora_path": str(path),
            "base_model": base_model,
            "sha256": sha256,
        }
        response = await self._send("POST", "/v1/load_lora_adapter", body)
        if response.is_success:
            return
        message, _ = _reason(response)
        if response.status_code == 400 and "already" in message and "loaded" in message:
            return  # perhaps from another copy: the name has the weights' digest
        if response.status_code in (400, 404, 422):
            raise LoadFailed(message)
        raise self._failed(response, message)

    async def unload(self, name: str) -> None:
        """Drops an adapter; one that is not there is no error."""
        response = await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
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
            f"the inference process at {self.url} cannot be reached "
            f"({str(error) or type(error).__name__}); start it with `python -m inference`, or "
            "say where it is with BRIDGE_INFERENCE_URL. Training goes on without it",
            headers={"Retry-After": "5"},
            outside="the inference process cannot be reached now; training goes on without it",
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
            yield chunk
    except (httpx.HTTPError, ValueError) as error:
        raise _broken(str(error) or type(error).__name__) from error
    raise _broken("the stream ended early")


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
