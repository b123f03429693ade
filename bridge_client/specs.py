"""Job specs on the client's side: read a file, apply `--set`, find what is wrong before sending."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from bridge_client.errors import SpecError
from bridge_engine.spec.yaml import load_yaml

if TYPE_CHECKING:
    from bridge_engine.spec.errors import FieldError
    from bridge_engine.spec.job import JobSpec


def as_dict(spec: dict[str, Any] | JobSpec | str | Path) -> dict[str, Any]:
    """A spec in whatever form, as the JSON object that is sent."""
    if isinstance(spec, dict):
        try:
            json.dumps(spec, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise SpecError(f"the spec cannot be written as JSON: {error}") from error
        return spec
    if isinstance(spec, str | Path):
        return read(Path(spec))
    if not isinstance(spec, BaseModel):
        raise SpecError(
            f"a {type(spec).__name__} is no spec: give a mapping, a TrainSpec, an EvaluationSpec "
            "or the path of a file"
        )
    return spec.model_dump(mode="json", by_alias=True, exclude_unset=True)


def read(path: Path) -> dict[str, Any]:
    """The spec in a YAML or JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"cannot read the spec {path}: {reason}") from error
    try:
        spec = load_yaml(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(spec, dict):
        raise SpecError(f"{path} holds no spec: it must be a mapping such as `method: bridge`")
    return spec


def override(spec: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """A copy of the spec with each `dotted.key=value` applied; values are read as YAML, and
    `dotted.key=@FILE` is the text of a file, less the line end at its end."""
    result: dict[str, Any] = _copy(spec)
    for setting in settings:
        key, equals, text = setting.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise SpecError(f"--set {setting}: write it as key=value, e.g. --set steps=50")
        # no YAML value begins with an @ that is not quoted
        value = _text_of(key, text[1:]) if text.startswith("@") else _value_of(key, text)
        _put(result, path, value)
    return result


def problems(spec: dict[str, Any]) -> list[FieldError]:
    """Everything wrong with the spec that can be known without the service's data and models."""
    from bridge_engine.spec.job import InvalidSpec, parse_spec

    try:
        parse_spec(spec)
    except InvalidSpec as error:
        return error.errors
    return []


def _value_of(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or error
        raise SpecError(
            f"--set {key}: {text[:60]!r} cannot be read as YAML ({str(why)[:200]})"
        ) from error


def _text_of(key: str, name: str) -> str:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"--set {key}: cannot read the file {name[:100]!r} ({str(reason)[:100]}); a text that "
            "begins with @ is written in quotes, '\"@…\"'"
        ) from error
    return text.removesuffix("\n")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _put(spec: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets one field. A short form on the way (`method: bridge`, `eval: gsm8k/test`) is written
    out, so that its other fields can be set."""
    *parents, last = path
    node = spec
    for depth, key in enumerate(parents):
        child = node.get(key)
        if isinstance(child, str):
            child = _written_out(path[: depth + 1], child)
        elif child is None:
            child = {}
        if not isinstance(child, dict):
            at = ".".join(path[: depth + 1])
            raise SpecError(f"--set {'.'.join(path)}: {at} is {child!r} and has no fields")
        node[key] = child
        node = child
    node[last] = value


def _written_out(path: list[str], short: str) -> Any:
    if path in (["method"], ["grader"]):
        return {"name": short}
    if len(path) == 2 and path[0] == "data":
        from pydantic import TypeAdapter

        from bridge_engine.spec.train import Dataset

        ref = TypeAdapter(Dataset).validate_python(short)
        return ref.model_dump(exclude_unset=True)
    return short
