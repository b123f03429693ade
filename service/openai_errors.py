"""Errors in the body that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

PREFIX = "/v1/"
"""Routes below it answer so."""


class ErrorBody(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    type: str
    param: str | None
    code: str | None
    errors: list[dict[str, Any]] | None = None
    """Every field at fault; the members above repeat the first one."""


class OpenAIError(BaseModel):
    """An error as OpenAI's API has it."""

    error: ErrorBody


def as_openai(
    status: int,
    code: str,
    message: str,
    param: str | None,
    request_id: str | None,
    errors: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, dict[str, Any]]:
    """(the status, the body) of an error. OpenAI knows no 422, and calls an unknown model so."""
    status = 400 if status == 422 else status
    if code in ("unknown_model", "unknown_adapter"):
        code, param = "model_not_found", "model"
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if errors:
        error["errors"] = list(errors)
    if request_id:
        error["request_id"] = request_id
    return status, {"error": error}
