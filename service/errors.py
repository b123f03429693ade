"""Every error of the API in one shape: RFC 9457 problem details, with words a program can act on.

Raise `ApiError` (or let the store's own errors pass); the handlers here do the rest. Nothing of an
unforeseen error's inside leaves the process: its traceback goes to the log under the request's id.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from bridge_engine.spec.errors import FieldError
from bridge_http.requests import RequestLog, note_trouble, request_id, tell_trouble
from service import openai_errors
from service.settings import Settings
from service.store import Store
from service.store.errors import Conflict, NotFound, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

PROJECT = "Bridge-Project"
MEDIA_TYPE = "application/problem+json"


class Detail(BaseModel):
    """One field that is wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    param: str
    """Dotted path of the field, e.g. `rollout.group_size`."""
    code: str
    """A stable word for the kind of mistake."""
    message: str
    given: Any = None
    """What was given."""
    allowed: list[str] | None = None
    """What may be given instead."""
    nearest: str | None = None
    """The allowed name that is most like the given one."""


class Problem(BaseModel):
    """What went wrong, where, and what to do about it (RFC 9457)."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = Field(examples=["urn:bridge:problem:unknown_method"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["'bridg' is not a known method; did you mean 'bridge'?"])
    """A sentence for a person."""
    code: str = Field(examples=["unknown_method"])
    """A stable snake_case word for a program."""
    param: str | None = Field(default=None, examples=["method"])
    """Dotted path of the field at fault."""
    given: Any = Field(default=None, examples=["bridg"])
    allowed: list[str] | None = Field(default=None, examples=[["bridge", "rl", "sft"]])
    nearest: str | None = Field(default=None, examples=["bridge"])
    errors: list[Detail] | None = None
    """Every problem found; the fields above repeat the first one."""
    request_id: str | None = None
    """The answer's X-Request-Id: what the service's log calls the request."""


class ApiError(Exception):
    """A request that is refused. `status` is HTTP's; the rest becomes the problem's body.

    `outside` is what takes the place of `detail` where others than this machine's users can ask:
    it names no addresses, users or paths.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        given: Any = None,
        allowed: Sequence[str] | None = None,
        nearest: str | None = None,
        errors: Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
        outside: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.outside = outside
        if status == 422 and not errors:  # every field at fault, though there is but this one
            param = param or "body"
            one = FieldError(
                param, code, detail, given, list(allowed) if allowed else None, nearest
            )
            errors = [one.as_dict()]
        self.extra: dict[str, Any] = {
            "param": param,
            "given": given,
            "allowed": list(allowed) if allowed is not None else None,
            "nearest": nearest,
            "errors": [dict(error) for error in errors] if errors else None,
        }
        self.headers = dict(headers or {})


def invalid_fields(errors: Sequence[FieldError]) -> ApiError:
    """422 with every field that is wrong; the first one speaks for all."""
    first = errors[0]
    more = len(errors) - 1
    others = f" (and {more} more: see errors)" if more else ""
    return ApiError(
        422,
        first.code,
        first.message + others,
        param=first.param,
        given=first.given,
        allowed=first.allowed,
        nearest=first.nearest,
        errors=[error.as_dict() for error in errors],
    )


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's account of a route's errors; every route can answer 403, 500 and 503."""
    return {
        status: {
            "model": Problem,
            "description": _MEANING.get(status, HTTPStatus(status).phrase),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in (403, *statuses, 500, 503)
    }


_MEANING = {
    400: "The body cannot be read: broken JSON or YAML.",
    403: "The request comes from a web page elsewhere, or under a name that is not the service's.",
    404: "There is no such thing.",
    409: "The request contradicts what is stored.",
    413: "The body is too large.",
    415: "The body is of a type that is not accepted here.",
    422: "The request is understood and cannot be carried out; every field at fault is named.",
    429: "Too many requests at once; Retry-After says when to come back.",
    500: "An unforeseen error; the service's log has it under the request id.",
    503: "The database or the inference process cannot be reached now.",
    507: "The disk is full, or the model larger than inference may load.",
}


# --------------------------------------------------------------------------- handlers


def install(app: FastAPI) -> None:
    """Puts the handlers and the request id in place."""
    app.add_middleware(RequestLog, failed=_failed)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(StoreError, _store_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _hung_up)


def respond(request: Request, error: ApiError) -> JSONResponse:
    """The error as an answer, and its code in the request's line of the log."""
    _shorten(error)
    note_trouble(request.scope, error.code, error.detail)
    _hide(request, error)
    if request.url.path.startswith(openai_errors.PREFIX):
        param, errors = error.extra["param"], _plain(error.extra["errors"])
        status, answer = openai_errors.as_openai(
            *(error.status, error.code, error.detail, param, request_id(request.scope), errors)
        )
        return JSONResponse(answer, status, error.headers)
    body = problem(error, request_id(request.scope))
    return JSONResponse(body, error.status, error.headers, media_type=MEDIA_TYPE)


def interrupt(request: Request, error: ApiError) -> None:
    """Readies an error for the middle of a stream: the log is told, and it says no more than
    whoever asks may know."""
    tell_trouble(request.scope, error.status, error.code, error.detail)
    _hide(request, error)


def _hide(request: Request, error: ApiError) -> None:
    asked_from_here = cast(Settings, request.app.state.settings).on_loopback
    if error.outside is not None and not asked_from_here:
        error.detail = error.outside


def problem(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """The problem's body, without the members that say nothing."""
    body = {
        "type": f"urn:bridge:problem:{error.code}",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        **error.extra,
        "request_id": request_id,
    }
    return {key: _plain(value) for key, value in body.items() if value is not None}


LONGEST_ECHO = 200
"""Characters of what was given that an answer repeats."""


def _shorten(error: ApiError) -> None:
    """Cuts what was given, wherever the answer repeats it: whoever sent it has it."""
    fields = [error.extra, *(error.extra["errors"] or ())]
    given = [field.get(name) for field in fields for name in ("given", "param")]
    for whole in {one for one in given if isinstance(one, str) and len(one) > LONGEST_ECHO}:
        cut = f"{whole[:LONGEST_ECHO]}… ({len(whole)} characters)"
        error.detail = _cut(error.detail, whole, cut)
        for field in fields:
            for name in ("given", "param", "message"):
                if isinstance(value := field.get(name), str):
                    field[name] = _cut(value, whole, cut)


def _cut(text: str, whole: str, cut: str) -> str:
    # As it is, or as Python writes it between quotes.
    return text.replace(whole, cut).replace(repr(whole)[1:-1], repr(cut)[1:-1])


def _plain(value: Any) -> Any:
    """The value as JSON can say it: given numbers may be infinite, given texts half a character."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return respond(request, error)


async def _store_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreError)
    if isinstance(error, NotFound):
        near = await _nearest(request, error)
        refusal = ApiError(
            404,
            f"unknown_{error.kind}",
            error.message + (f"; did you mean {near!r}?" if near else ""),
            param=_where(request, error.id),
            given=error.id,
            nearest=near,
        )
    elif isinstance(error, Conflict):
        param = "Idempotency-Key" if error.code == "idempotency_key_reused" else None
        refusal = ApiError(409, error.code, error.message, param=param, allowed=error.allowed)
    elif isinstance(error, StoreUnavailable):
        refusal = ApiError(
            503,
            f"database_{error.reason}",
            error.message,
            headers={"Retry-After": "2"},
            outside=trouble(error),
        )
    else:
        return respond(request, _unforeseen(request, error))
    return respond(request, refusal)


async def _nearest(request: Request, error: NotFound) -> str | None:
    if error.kind != "job":
        return None
    with suppress(StoreError):
        store = cast(Store, request.app.state.store)
        return await run_in_threadpool(store.nearest_job, error.id)
    return None


def _where(request: Request, given: str) -> str | None:
    """By which part of the request's address or head it was named."""
    parts = [*request.path_params.items(), *request.query_params.items()]
    named = [name for name, value in parts if value == given]
    if not named and request.headers.get(PROJECT) == given:
        return PROJECT
    return named[0] if named else None


def trouble(error: StoreUnavailable) -> str:
    """What is the matter with the database, for those who need not know where it is."""
    return f"the database cannot do its work now ({error.reason}); the service's log says more"


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Query parameters, headers and the like; bodies are read by `service.body`."""
    assert isinstance(error, RequestValidationError)
    return respond(request, invalid_fields(list(_parameter_errors(error.errors()))))


def _parameter_errors(items: Iterable[Mapping[str, Any]]) -> Iterable[FieldError]:
    for item in items:
        param = ".".join(str(part) for part in item["loc"][1:]) or str(item["loc"][0])
        param = param.title() if item["loc"][0] == "header" else param
        given = item.get("input")
        plain = given if isinstance(given, str | int | float | bool) else None
        shown = f" (given: {plain!r})" if plain is not None else ""
        expected = str((item.get("ctx") or {}).get("expected", ""))
        allowed = re.findall(r"'([^']*)'", expected) if item["type"] == "literal_error" else None
        message = f"{param}: {item['msg']}{shown}"
        yield FieldError(param, str(item["type"]), message, given=plain, allowed=allowed)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        meant = path.rstrip("/")
        hint = (
            f"did you mean {meant}?" if meant != path and _methods(request, meant) else "see /docs"
        )
        detail = f"there is nothing at {path}; {hint}"
        refusal = ApiError(404, "unknown_path", detail, given=path)
    elif error.status_code == 405:
        takes = _methods(request, path)
        refusal = ApiError(
            405,
            "method_not_allowed",
            f"{path} does not take {request.method}; it takes {', '.join(takes)}",
            given=request.method,
            allowed=takes,
            headers={"Allow": ", ".join(takes)},
        )
    else:
        refusal = ApiError(
            error.status_code, f"http_{error.status_code}", str(error.detail), headers=error.headers
        )
    return respond(request, refusal)


def _methods(request: Request, path: str) -> list[str]:
    """The methods that all routes of the path take together: each of them has one."""
    routes: list[BaseRoute] = request.app.routes
    takes = []
    for method in ("DELETE", "GET", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "path": path, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in routes):
            takes += [method, "HEAD"] if method == "GET" else [method]
    return takes


async def _hung_up(request: Request, error: Exception) -> JSONResponse:
    """The client left in the middle of its body; nobody will read this."""
    return respond(request, ApiError(400, "incomplete_body", "the body ended early"))


def _unforeseen(request: Request, error: Exception) -> ApiError:
    called = request_id(request.scope)
    log.error("request %s failed unforeseen", called, exc_info=error)
    return ApiError(
        500, "internal", f"an unforeseen error; the service's log has it as request {called}"
    )


def _failed(scope: Scope, error: Exception) -> JSONResponse:
    request = Request(scope)
    return respond(request, _unforeseen(request, error))
