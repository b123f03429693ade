"""What all routes demand of query parameters: that they are known, and that a page's `after` is
the `next` of a page before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant

from bridge_engine.spec.errors import FieldError, unknown_name
from service.errors import ApiError, invalid_fields
from service.store import NotFound


async def known_parameters(request: Request) -> None:
    """Refuses query parameters that the route does not have, with the nearest one it has: a
    misspelt `limit` would be ignored, a misspelt `dry_run` costs hours. A FastAPI dependency
    (`async`: it waits for nothing, and otherwise would be sent through a thread each time)."""
    if not request.scope["query_string"]:
        return
    known = set(_names(request.scope["route"].dependant))
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if unknown:
        raise invalid_fields([_unknown(name, known) for name in unknown])


def _unknown(name: str, known: set[str]) -> FieldError:
    if not known:
        message = f"{name!r} is not a known parameter; there are none here"
        return FieldError(name, "unknown_parameter", message, given=name)
    return unknown_name(name, "parameter", name, known)


def _names(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _names(inner)


def check_cursor(look: Callable[[str], object], after: str | None) -> None:
    """`ApiError` 404 that names the cursor if there is nothing of that name to `look` at."""
    if after is None:
        return
    try:
        if not after.isascii() or not after.isprintable():
            raise NotFound("entry", after)
        look(after)
    except NotFound as error:
        raise unknown_cursor(error) from None


def unknown_cursor(error: NotFound) -> ApiError:
    """404 for an `after` that names nothing."""
    return ApiError(
        404,
        f"unknown_{error.kind}",
        f"after: {error.message}; it takes the `next` of the page before",
        param="after",
        given=error.id,
    )
