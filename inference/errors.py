"""Errors in the body vLLM and OpenAI give them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any


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


def error_body(message: str, type: str, status: int, param: str | None = None) -> dict[str, Any]:
    """vLLM's error shape."""
    return {"error": {"message": message, "type": type, "param": param, "code": status}}
