"""Turns a spec that does not validate into sentences: which field, what was given, what is allowed.

Shared by the API (422 problem bodies), the command line and the engine's own entry point.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bridge_engine.methods import METHODS
from bridge_engine.spec.train import TrainSpec


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with a spec."""

    param: str
    """Dotted path of the field, e.g. `rollout.group_size`."""
    code: str
    message: str
    given: Any = None
    allowed: list[str] | None = None
    nearest: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the fields that say nothing."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def nearest_name(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name a person most likely meant, or None when nothing is near."""
    matches = difflib.get_close_matches(given.lower(), list(allowed), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(param: str, what: str, given: str, allowed: Iterable[str]) -> FieldError:
    """The error for a name that is not in a list of names."""
    names = sorted(allowed)
    return FieldError(
        param=param,
        code=f"unknown_{what.replace(' ', '_')}",
        message=f"{given!r} is not a known {what}{did_you_mean(given, names)} "
        f"Allowed: {', '.join(names)}.",
        given=given,
        allowed=names,
        nearest=nearest_name(given, names),
    )


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: a full stop, with the nearest name if any."""
    near = nearest_name(given, allowed)
    return f"; did you mean {near!r}?" if near else "."


def field_errors(
    error: ValidationError, model: type[BaseModel] = TrainSpec, prefix: Sequence[str] = ()
) -> list[FieldError]:
    """Every problem pydantic found, in the spec's own words."""
    return [_field_error(item, model, prefix) for item in error.errors(include_url=False)]


def _field_error(item: Any, model: type[BaseModel], prefix: Sequence[str]) -> FieldError:
    location = [part for part in item["loc"] if not _is_tag(part, item["loc"])]
    path = ".".join([*prefix, *map(str, location)])
    kind: str = item["type"]
    given = item.get("input")
    context: dict[str, Any] = item.get("ctx") or {}
    if kind == "impossible_combination":
        return FieldError(context["param"], kind, context["message"])
    if kind == "extra_forbidden":
        owner = _model_at(model, item["loc"][:-1])
        return unknown_name(path, "field", str(item["loc"][-1]), _field_names(owner))
    if kind == "union_tag_invalid" or (kind == "union_tag_not_found" and path == "method"):
        name = given.get("name") if isinstance(given, dict) else given
        return unknown_name(path, "method", str(name), METHODS)
    if kind == "literal_error":
        allowed = _literals(str(context.get("expected", "")))
        return unknown_name(path, "value", str(given), allowed)
    if kind == "missing":
        return FieldError(path, kind, f"{path} is required")
    simple = given if isinstance(given, str | int | float | bool | None) else None
    shown = f" (given: {simple!r})" if simple is not None else ""
    return FieldError(path, kind, f"{path}: {_words(item, path)}{shown}", given=simple)


_WORDS = {
    "too_short": "needs at least {min_length}, and has {actual_length}",
    "too_long": "takes at most {max_length}",
    "model_type": "a mapping of fields is wanted",
    "list_type": "a list is wanted",
    "tuple_type": "a list is wanted",
    "float_type": "a number is wanted",
    "int_type": "a whole number is wanted",
    "int_from_float": "a whole number is wanted",
    "bool_type": "true or false is wanted",
    "string_type": "a text is wanted; one that looks like a number needs quotes",
}
"""Where pydantic speaks of its own affairs."""
_SHORT_FORMS = {
    "DatasetRef": "a dataset's name",
    "EvalSet": "a dataset's name",
    "GraderSpec": "a grader's name",
    "RewardSpec": "a reward's name",
    "StudentSpec": "`lora`, `full`",
}
_FORMS = {
    "adapter": "an adapter is JOB, JOB@STEP, JOB@best, JOB@latest or an alias",
    "job": "a job's id is wanted, job_…",
    "completions_of": "a job's id is wanted, job_…",
}
"""Of fields with a pattern."""


def _words(item: Any, path: str) -> str:
    kind, context = item["type"], item.get("ctx") or {}
    field = path.rpartition(".")[2]
    if kind == "string_pattern_mismatch" and field in _FORMS:
        return _FORMS[field]
    words = _WORDS.get(kind)
    if words is None:
        return str(item["msg"]).replace("Input should be", "should be", 1)
    short = _SHORT_FORMS.get(context.get("class_name", ""))
    return f"{short} or {words}" if short else words.format(**context)


_UNION_TAGS = {*METHODS, "constant", "schedule", "list[str]", "literal['all-linear']"}


def _is_tag(part: Any, location: Sequence[Any]) -> bool:
    """Pydantic puts the chosen union member into the path; a person's spec has no such level."""
    index = list(location).index(part)
    return part in _UNION_TAGS and index > 0


def _model_at(model: type[BaseModel], location: Sequence[Any]) -> type[BaseModel]:
    """The model class that holds the field at `location`."""
    for part in location:
        if part in METHODS:
            model = METHODS[part]
            continue
        field = model.model_fields.get(str(part))
        inner = _model_of(field) if field else None
        if inner is not None:
            model = inner
    return model


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    stack: list[Any] = [field.annotation]
    while stack:
        annotation = stack.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        stack.extend(getattr(annotation, "__args__", ()))
    return None


def _field_names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _literals(expected: str) -> list[str]:
    """Pydantic lists a literal's members as "'a', 'b' or 'c'"."""
    return [word.strip(" '") for word in expected.replace(" or ", ", ").split(",") if word.strip()]
