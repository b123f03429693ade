"""What every part of the job spec has in common."""

from __future__ import annotations

import unicodedata
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError


class SpecModel(BaseModel):
    """Strict by intent: an unknown field is an error, never silently ignored, and so is a value of
    another type than the field's: `steps: true` is not one step."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        populate_by_name=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        _refuse_guess(value, cls.model_fields[info.field_name].annotation)
        return value


def impossible(param: str, message: str) -> PydanticCustomError:
    """A combination of fields that cannot work; `param` is the field to change."""
    return PydanticCustomError(
        "impossible_combination", "{message}", {"message": message, "param": param}
    )


# --------------------------------------------------------------------------- names for people

_NOT_OF_A_LINE = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's control characters, halves of characters, separators of lines and of paragraphs."""
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They let text be shown in another order than it is in."""


def is_plain(character: str) -> bool:
    """Does it neither end a line nor steer what shows it?"""
    return unicodedata.category(character) not in _NOT_OF_A_LINE and character not in _DIRECTIONS


def one_line(value: str) -> str:
    """A text that a list can show as it is: on a terminal a control character could do anything."""
    for place, character in enumerate(value):
        if not is_plain(character):
            raise PydanticCustomError(
                "control_character",
                "character {place} is U+{number}, a control character; a name is one line of text",
                {"place": place + 1, "number": f"{ord(character):04X}"},
            )
    return value


NAME_LENGTH = 200
Name = Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(one_line)]
"""What people call a thing."""


# --------------------------------------------------------------------------- types


def _refuse_guess(value: Any, annotation: Any) -> None:
    """Refuses what pydantic would make a number, or true or false, of. A whole number passes for
    any, and so does `1e3` for a whole one; texts are left to fields that take texts."""
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_guess(item, _elements(annotation))
        return
    kinds, literals = _scalars(annotation)
    numbers = bool(kinds & {int, float})
    if isinstance(value, bool):
        if numbers and bool not in kinds:
            raise PydanticCustomError("wrong_type", "a number is wanted, not true or false")
    elif isinstance(value, str):
        if str in kinds or value in literals or (literals and not _is_number(value)):
            return
        if numbers:
            raise PydanticCustomError("wrong_type", "a number is wanted, and it has no quotes")
        if bool in kinds:
            raise PydanticCustomError("wrong_type", "true or false is wanted, without quotes")
    elif isinstance(value, int | float) and bool in kinds and not numbers:
        raise PydanticCustomError("wrong_type", "true or false is wanted, not a number")


def _scalars(annotation: Any) -> tuple[set[type], set[Any]]:
    """(the plain types that a field may have, the single values that it may have)."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return set(), set(arguments)
    if origin is Annotated:
        return _scalars(arguments[0])
    if origin in (Union, UnionType):
        found = [_scalars(one) for one in arguments]
        return set().union(*(k for k, _ in found)), set().union(*(v for _, v in found))
    return ({annotation} if annotation in (bool, int, float, str) else set()), set()


def _elements(annotation: Any) -> Any:
    """What may stand in the lists that a field may have."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _elements(arguments[0])
    if origin in (Union, UnionType):
        inner = tuple(one for one in map(_elements, arguments) if one is not None)
        return Union[inner] if inner else None  # noqa: UP007 - made here, not written
    return Union[arguments] if origin in (list, tuple) else None  # noqa: UP007


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
