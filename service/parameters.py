"""What all routes demand of query parameters: that they are known, and that a page's `after` is
the `next` of a page before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from fastapi import Request
from fastapi.dependencies.models import Dependant

from bridge_engine.spec.errors import FieldError, unknown_name
from service.errors import ApiError, invalid_fields
from service.store import NotFound


async def known_parameters(request: Request) -> None:
    """Refuses query parameters that the route does not have, with the nearest one it has, and those
    that are given twice: a misspelt `limit` would be ignored, a misspelt `dry_run` costs hours. A
    FastAPI dependency (`async`: it waits for nothing, and otherwise would be sent through a thread
    each time)."""
    if not request.scope["query_string"]:
        return
    fields = {field.alias: field for field in _fields(request.scope["route"].dependant)}
    known = set(fields)
    given = Counter(name for name, _ in request.query_params.multi_items())
    wrong = [_unknown(name, known) for name in given if name not in known]
    wrong += [
        FieldError(name, "repeated_parameter", f"{name} is given {count} times; it takes one value")
        for name, count in given.items()
        if count > 1 and name in known and not _takes_several(fields[name])
    ]
    if wrong:
        raise invalid_fields(wrong)


def _unknown(name: str, known: set[str]) -> FieldError:
    if not known:
        message = f"{name!r} is not a known parameter; there are none here"
        return FieldError(name, "unknown_parameter", message, given=name)
    return unknown_name(name, "parameter", name, known)


def _fields(dependant: Dependant) -> Iterator[Any]:
    yield from dependant.query_params
    for inner in dependant.dependencies:
        yield from _fields(inner)


def _takes_several(field: Any) -> bool:
    annotation = field.field_info.annotation
    return any(get_origin(part) is list for part in (annotation, *get_args(annotation)))


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
