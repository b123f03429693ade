"""Errors in the body vLLM and OpenAI give them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from bridge_engine.errors import EngineError

UNAVAILABLE = "ModelUnavailableError"
"""What the service tells apart from a server that is busy."""


class InferenceError(Exception):
    """A request that cannot be answered; `status` is the HTTP status, `type` OpenAI's word."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "BadRequestError",
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.retry_after = retry_after
        """Seconds after which the same request may succeed; None when it will not."""

    def body(self) -> dict[str, Any]:
        """The response body."""
        return error_body(self.message, self.type, self.status, self.param)


def not_found(message: str) -> InferenceError:
    """The model or adapter is not here."""
    return InferenceError(message, status=404, type="NotFoundError", param="model")


def not_had(error: EngineError) -> InferenceError:
    """A base model is not to be had: there is none of the name (404), or it is the model's folder
    or the hub that keeps it (500, or 503 where that may pass), and nobody asked wrongly."""
    if error.code == "unknown_model":
        return not_found(error.message)
    if error.retryable:
        return InferenceError(
            error.message, status=503, type=UNAVAILABLE, param="model", retry_after=30
        )
    return InferenceError(error.message, status=500, type="InternalServerError", param="model")


def too_large(what: str, need: int, limit: int, param: str) -> InferenceError:
    """It would not fit even if nothing else were loaded."""
    return InferenceError(
        f"{what} {said(need)}; inference may use {said(limit)}. Raise BRIDGE_INFERENCE_MEMORY_GB, "
        "or use a smaller one.",
        status=507,
        type="InsufficientStorageError",
        param=param,
    )


def said(count: int) -> str:
    """So many bytes, as people say it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def error_body(message: str, type: str, status: int, param: str | None = None) -> dict[str, Any]:
    """vLLM's error shape."""
    return {"error": {"message": message, "type": type, "param": param, "code": status}}
