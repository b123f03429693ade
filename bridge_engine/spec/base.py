"""What every part of the job spec has in common."""

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class SpecModel(BaseModel):
    """Strict by intent: an unknown field is an error, never silently ignored."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        populate_by_name=True,
    )


def impossible(param: str, message: str) -> PydanticCustomError:
    """A combination of fields that cannot work; `param` is the field to change."""
    return PydanticCustomError(
        "impossible_combination", "{message}", {"message": message, "param": param}
    )
