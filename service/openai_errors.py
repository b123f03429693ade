"""Errors in the body that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

PREFIX = "/v1/"
"""Routes below it answer so."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error as OpenAI's API has it."""

    error: ErrorBody


def as_openai(
    status: int, code: str, message: str, param: str | None, request_id: str | None
) -> tuple[int, dict[str, Any]]:
    """(the status, the body) of an error. OpenAI knows no 422, and calls an unknown model so."""
    status = 400 if status == 422 else status
    if code in ("unknown_model", "unknown_adapter"):
        code, param = "model_not_found", "model"
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    if request_id:
        error["request_id"] = request_id
    return status, {"error": error}
