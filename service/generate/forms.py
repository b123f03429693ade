"""Fields that may have one of several forms. Pydantic tells of every form why the value is none of
it, dozens of reasons for one mistake; here whoever asks is told once what may be given."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

MOST_PROMPTS = 64


def forms(what: str) -> WrapValidator:
    """Tells `what` the field may be."""

    def checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise _wrong(f"it must be {what}") from None

    return WrapValidator(checked)


def _few(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, list) and len(value) > MOST_PROMPTS and isinstance(value[0], str | list):
        raise _wrong(f"there are {len(value)} prompts; a request takes at most {MOST_PROMPTS}")
    return check(value)


def some(what: str) -> BeforeValidator:
    """Tells of an empty list that there must be `what` in it."""

    def checked(value: Any) -> Any:
        if value == []:
            raise _wrong(f"it is empty; give at least one {what}")
        return value

    return BeforeValidator(checked)


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong_form", "{message}", {"message": message})


Stop = Annotated[
    str | Annotated[list[str], Field(max_length=16)],
    forms("a text, or a list of at most 16 texts"),
]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)],
    forms(f"a text, a list of token ids, or up to {MOST_PROMPTS} of either in a list"),
    WrapValidator(_few),
]
