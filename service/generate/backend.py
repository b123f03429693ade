"""An inference server as the service speaks to it: vLLM's routes over HTTP.

What is here fits the local process (`python -m inference`); `vllm` has what is different of a vLLM
server. Only these few routes are ever asked for: what else a server offers is out of reach of
whoever asks us. Every failure comes out as an `ApiError` that says whose it is: not reachable
(503), too busy (429), the request's own fault (404, 422), too little memory allowed (507), or the
backend's (502, 504).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from service.errors import ApiError
from service.generate.answers import AnswerStream, check_ends, cut_off
from service.generate.connections import CONNECT_SECONDS, Connections
from service.store import AdapterRow
from service.store.database import load_json

ANSWER_SECONDS = 290.0
"""Loading a model the first time and a long generation both fit in; a little less than the client
waits, so that it hears why. Of a stream: the longest silence."""


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LOAD_MODEL = "/v1/load_model"
"""The local process's own."""
UNAVAILABLE = "ModelUnavailableError"
"""The local process's word for a base model that cannot be fetched just now."""
LOADED_NAME = re.compile(r"[^\s:@]+@\d+(-student)?:[0-9a-f]{12}")
"""What `loaded_name` gives, which nobody else would call an adapter."""


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


@dataclass(frozen=True)
class Reply:
    """A whole answer of the server's."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def is_success(self) -> bool:
        """Is it what was asked for?"""
        return _good(self.status)


def _good(status: int) -> bool:
    return 200 <= status < 300


def loaded_name(adapter: AdapterRow) -> str:
    """A name for the adapter that means these weights and no others, for ever."""
    return f"{adapter.name}:{adapter.sha256[:12]}"


class InferenceBackend:
    """A client of one inference server. Waiting for it costs no thread."""

    start_it = "under `bridge up` it is started again by itself, else start `python -m inference`"
    look_seconds = ANSWER_SECONDS
    """So long it may take to say what it has loaded."""
    needs_ends = False
    """Must it be told where answers end?"""
    dtype = ""
    """What it serves in, where that is known and need not be what was trained in."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url
        self.pinned: frozenset[str] = frozenset()
        """Names of adapters that never make room for others."""
        self.proved: set[str] = set()
        """Names whose canary was answered rightly since they were loaded there: nothing else may
        be asked. Kept here and not in the database, which does not see a server start anew."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections = Connections(url, headers)

    async def close(self) -> None:
        """Closes the connections that the running event loop keeps open."""
        await self._connections.close()

    async def healthy(self) -> bool:
        """Does it answer?"""
        try:
            async with await self._request("GET", "/health", None, CONNECT_SECONDS) as response:
                return _good(response.status)
        except (aiohttp.ClientError, TimeoutError):
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

    def lost(self) -> list[str]:
        """Adapters that it should get back, because it had them before it was restarted. The local
        process decides for itself what it keeps."""
        return []

    async def loaded(self) -> list[dict[str, Any]]:
        """OpenAI's card of every base model and adapter that is loaded; `ApiError` if it cannot
        say."""
        reply = await self._send("GET", "/v1/models", seconds=self.look_seconds)
        if not reply.is_success:
            raise self._failed(reply, _reason(reply)[0])
        cards: list[dict[str, Any]] = _listed(reply, "data")["data"]
        return cards

    async def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions or /v1/chat/completions; raises `NotLoaded`."""
        reply = await self._send("POST", path, body)
        self._check(reply)
        answer = _listed(reply, "choices")
        check_ends(answer)
        return answer

    async def stream(self, path: str, body: dict[str, Any]) -> AnswerStream:
        """The same as it is written."""
        with self._explained(ANSWER_SECONDS):
            response = await self._request("POST", path, {**body, "stream": True}, ANSWER_SECONDS)
        if not _good(response.status):
            try:
                self._check(await _whole(response))
            except aiohttp.ClientError as error:
                raise cut_off(error) from error
        return AnswerStream(response)

    async def load(self, name: str, folder: Path, adapter: AdapterRow) -> None:
        """Loads an adapter or a whole model under its immutable name; raises `LoadFailed` with the
        reason."""
        if adapter.is_model:
            model = {"name": name, "path": str(folder), "pinned": name in self.pinned}
            await self._load(LOAD_MODEL, model, adapter)
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
        reply = await self._send("POST", path, body)
        if not reply.is_success:
            self._not_loaded(reply, _reason(reply)[0], adapter)

    def _not_loaded(self, reply: Reply, message: str, adapter: AdapterRow) -> None:
        """Raises what the refusal to load an adapter means, unless it is loaded already: perhaps
        from another copy, but the name has the weights' digest."""
        if reply.status == 400 and "already" in message and "loaded" in message:
            return
        if reply.status in (400, 404, 422):
            raise LoadFailed(message)
        raise self._failed(reply, message)

    async def unload(self, name: str) -> None:
        """Drops an adapter; one that is not there is no error."""
        self.proved.discard(name)
        reply = await self._send("POST", UNLOAD, {"lora_name": name})
        if not reply.is_success and reply.status != 404:
            raise self._failed(reply, _reason(reply)[0])

    def _check(self, reply: Reply) -> None:
        if reply.is_success:
            return
        message, param = _reason(reply)
        if reply.status == 404:
            raise NotLoaded(message)
        if reply.status in (400, 413, 422):
            raise ApiError(422, "cannot_generate", message, param=param)
        raise self._failed(reply, message)

    async def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float = ANSWER_SECONDS,
    ) -> Reply:
        with self._explained(seconds):
            return await _whole(await self._request(method, path, body, seconds))

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float
    ) -> aiohttp.ClientResponse:
        """The head of the answer, once it is there."""
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        return await self._connections.ask(method, path, content, seconds)

    @contextmanager
    def _explained(self, seconds: float) -> Iterator[None]:
        """What becomes of a server that cannot be reached, or is silent for so long."""
        try:
            yield
        except aiohttp.SocketTimeoutError as error:
            if seconds < ANSWER_SECONDS:
                raise self._silent() from error
            raise ApiError(
                504,
                "inference_timeout",
                f"inference did not answer within {seconds:.0f} s; ask for fewer tokens",
            ) from error
        except aiohttp.ClientError as error:
            self._was_away()
            raise self._unreachable(error) from error

    def _was_away(self) -> None:
        """It cannot be reached. When it is back, it may be another process with other weights."""
        self.proved.clear()

    def _silent(self) -> ApiError:
        return ApiError(
            503,
            "inference_unreachable",
            f"the inference server at {self.url} does not say within {self.look_seconds:.0f} s "
            "what it has loaded; if that does not pass, restart it. Training goes on without it",
            headers={"Retry-After": "5"},
            outside="inference does not answer now; training goes on without it",
        )

    def _unreachable(self, error: aiohttp.ClientError) -> ApiError:
        why = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        return ApiError(
            503,
            "inference_unreachable",
            f"the inference server at {self.url} cannot be reached "
            f"({str(why) or type(why).__name__}); {self.start_it}, or "
            "say where it is with BRIDGE_INFERENCE_URL. Training goes on without it",
            headers={"Retry-After": "5"},
            outside="inference cannot be reached now; training goes on without it",
        )

    def _failed(self, reply: Reply, message: str) -> ApiError:
        if reply.status in (429, 503):
            after = reply.headers.get("Retry-After", "")
            after = after if after.isascii() and after.isdigit() else "2"
            headers = {"Retry-After": after}
            if _error(reply).get("type") == UNAVAILABLE:
                outside = "the base model cannot be had now; see the service's log"
                return ApiError(503, "model_unavailable", message, headers=headers, outside=outside)
            return ApiError(reply.status, "inference_busy", message, headers=headers)
        if reply.status == 507:
            return ApiError(507, "model_too_large", message)
        return ApiError(502, "inference_failed", f"inference failed: {message}")


async def _whole(response: aiohttp.ClientResponse) -> Reply:
    async with response:
        return Reply(response.status, response.headers, await response.read())


def _listed(reply: Reply, what: str) -> dict[str, Any]:
    """The answer's JSON, an object with a list under `what`."""
    try:
        answer = load_json(reply.content)
        if isinstance(answer[what], list):
            return dict(answer)
    except (ValueError, LookupError, TypeError):
        pass
    raise ApiError(502, "inference_failed", f"inference failed: it answered without any {what}")


def _reason(reply: Reply) -> tuple[str, str | None]:
    """The message and the field at fault."""
    error = _error(reply)
    param = error.get("param")
    return str(error.get("message") or error), param if isinstance(param, str) else None


def _error(reply: Reply) -> dict[str, Any]:
    """The error in one of the shapes that vLLM has had."""
    try:
        body = load_json(reply.content)
    except ValueError:
        text = reply.content.decode(errors="replace")
        return {"message": text[:500] or f"HTTP status {reply.status}"}
    error = body.get("error", body) if isinstance(body, dict) else body
    return error if isinstance(error, dict) else {"message": str(error)}
