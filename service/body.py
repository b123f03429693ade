"""Reads a request's JSON or YAML body as a pydantic model, and says exactly what is wrong."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TypeVar

import yaml
from fastapi import Request
from pydantic import BaseModel, ValidationError

from bridge_engine.spec.errors import field_errors
from bridge_engine.spec.yaml import load_yaml, repeated
from service.errors import ApiError, invalid_fields

MAX_BYTES = 1_000_000
"""No spec and no prompt is larger; datasets are uploaded, not posted."""
MAX_YAML_BYTES = 200_000
"""YAML is read at some 50 kB a second, and a request must not keep the service busy for longer."""

_SURROGATE = re.compile(rb"\\(u|U0000)[dD][89a-fA-F]")
"""What may be the escape of half a character; few bodies have one, and only those are searched."""
_JSON = re.compile(r"application/(json|[\w.+-]+\+json)")
_YAML = re.compile(r"(application|text)/(x-)?yaml")

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request) -> tuple[bytes, str]:
    """The body's bytes and media type ("" where it is not said); 413 as soon as it proves too
    large. A FastAPI dependency."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BYTES:
            raise _too_large()
        chunks.append(chunk)
    media_type = request.headers.get("content-type", "").partition(";")[0]
    return b"".join(chunks), media_type.strip().lower()


def parse(body: tuple[bytes, str], model: type[Model], *, allow_yaml: bool = False) -> Model:
    """The body as a `model`, with values of its fields' own types: no "3" for a number. Raises
    `ApiError`: 415 for another media type, 400 with the position for broken text, 422 with every
    field that is wrong."""
    try:
        return model.model_validate(read_object(body, allow_yaml=allow_yaml), strict=True)
    except ValidationError as error:
        raise invalid_fields(field_errors(error, model)) from None


def read_object(body: tuple[bytes, str], *, allow_yaml: bool = False) -> dict[str, Any]:
    """The object in the body; the same errors, without a look at its fields."""
    content, media_type = body
    if _JSON.fullmatch(media_type) or not (media_type or content):
        value = _from_json(content)
    elif allow_yaml and _YAML.fullmatch(media_type):
        value = _from_yaml(content)
    else:
        # Form types and none at all are also what a foreign web page may send without asking.
        accepted = "application/json or application/yaml" if allow_yaml else "application/json"
        raise ApiError(
            415,
            "unsupported_media_type",
            f"the body is {media_type or 'of no stated Content-Type'}; send it as {accepted} "
            f"(curl: -H 'Content-Type: {accepted.split()[-1]}' --data-binary @FILE)",
            given=media_type or None,
            allowed=accepted.split(" or "),
        )
    if _SURROGATE.search(content):
        _refuse_half_characters(value)
    if not isinstance(value, dict):
        what = "empty" if value is None else f"a {type(value).__name__}"
        raise ApiError(422, "not_an_object", f"the body must be an object of fields; it is {what}")
    return value


def _from_json(content: bytes) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(_text(content), parse_constant=_no_constant, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(
            400, "broken_json", f"the body is not valid JSON: {error.msg} at {where}"
        ) from None
    except RecursionError:
        raise ApiError(400, "broken_json", "the body is nested too deeply") from None
    except ValueError:
        raise ApiError(400, "broken_json", f"the body cannot be read: {_TOO_MANY_DIGITS}") from None


_TOO_MANY_DIGITS = f"it has a whole number of more than {sys.get_int_max_str_digits()} digits"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (found := repeated(name for name, _ in pairs)) is not None:
        name = _writable(found)
        raise ApiError(
            400, "duplicate_key", f"the body has the key {name!r} twice; say it once", param=name
        )
    return dict(pairs)


def _refuse_half_characters(value: Any) -> None:
    """JSON and YAML can say `\\ud800` alone, which is no character: no database, file or header
    could have it."""
    for field, part in value.items() if isinstance(value, dict) else [(None, value)]:
        try:
            json.dumps([field, part], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            text, at = error.object, error.start
            raise ApiError(
                400,
                "broken_encoding",
                f"the body has \\u{ord(text[at]):04x} alone, half of a surrogate pair, after "
                f"{text[max(1, at - 30) : at]!r}; send a whole character",
                param=None if field is None else _writable(str(field)),
            ) from None
        except RecursionError:
            raise ApiError(400, "broken_encoding", "the body is nested too deeply") from None
        except ValueError:  # YAML's
            detail = f"the body cannot be read: {_TOO_MANY_DIGITS}"
            raise ApiError(400, "broken_encoding", detail) from None


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _no_constant(name: str) -> None:
    raise ApiError(400, "broken_json", f"the body is not valid JSON: {name} is not a number there")


def _from_yaml(content: bytes) -> Any:
    if len(content) > MAX_YAML_BYTES:
        raise _too_large(MAX_YAML_BYTES)
    try:
        return load_yaml(_text(content))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        detail = f"the body is not valid YAML: {error.problem or error.context}{where}"
        raise ApiError(400, "broken_yaml", detail) from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ApiError(400, "broken_yaml", f"the body is not valid YAML: {first}") from None


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, "broken_encoding", f"the body is not UTF-8: byte {error.start} begins no character"
        ) from None


def _too_large(limit: int = MAX_BYTES) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"the body is larger than {limit} bytes; upload data with POST /datasets and name it",
    )
