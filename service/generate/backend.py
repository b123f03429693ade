"""The inference process as the service speaks to it: vLLM's routes over HTTP.

Every failure comes out as an `ApiError` that says whose it is: not reachable (503), too busy (429),
the request's own fault (404, 422), or the backend's (502, 504).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from service.errors import ApiError

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 290.0
"""Loading a model the first time and a long generation both fit in; a little less than the client
waits, so that it hears why."""


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
    """A client of one inference server. Safe to share between threads."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            # A loopback address must never be sent through a proxy of the environment.
            trust_env=False,
            transport=transport,
        )

    def close(self) -> None:
        """Closes the connections kept open."""
        self._http.close()

    def healthy(self) -> bool:
        """Does it answer?"""
        try:
            return self._http.get("/health", timeout=CONNECT_SECONDS).is_success
        except httpx.HTTPError:
            return False

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of /v1/completions or /v1/chat/completions; raises `NotLoaded`."""
        response = self._post(path, body)
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        message, param = _reason(response)
        if response.status_code == 404:
            raise NotLoaded(message)
        if response.status_code in (400, 413, 422):
            raise ApiError(422, "cannot_generate", message, param=param)
        raise self._failed(response, message)

    def load(self, name: str, path: Path, base_model: str) -> None:
        """Loads an adapter under its immutable name; raises `LoadFailed` with the reason."""
        body = {"lora_name": name, "lora_path": str(path), "base_model": base_model}
        response = self._post("/v1/load_lora_adapter", body)
        if response.is_success:
            return
        message, _ = _reason(response)
        if response.status_code in (400, 404, 422):
            raise LoadFailed(message)
        raise self._failed(response, message)

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return self._http.post(path, json=body)
        except httpx.ReadTimeout as error:
            raise ApiError(
                504,
                "inference_timeout",
                f"inference did not answer within {ANSWER_SECONDS:.0f} s; ask for fewer tokens",
            ) from error
        except httpx.TransportError as error:
            raise ApiError(
                503,
                "inference_unreachable",
                f"the inference process at {self.url} cannot be reached "
                f"({str(error) or type(error).__name__}); start it with `python -m inference`, or "
                "say where it is with BRIDGE_INFERENCE_URL. Training goes on without it",
                headers={"Retry-After": "5"},
                outside="the inference process cannot be reached now; training goes on without it",
            ) from error

    def _failed(self, response: httpx.Response, message: str) -> ApiError:
        if response.status_code in (429, 503):
            status = response.status_code
            after = response.headers.get("retry-after", "2")
            return ApiError(status, "inference_busy", message, headers={"Retry-After": after})
        return ApiError(502, "inference_failed", f"inference failed: {message}")


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
