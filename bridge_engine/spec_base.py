"""What every part of the job spec has in common."""

from pydantic import BaseModel, ConfigDict


class SpecModel(BaseModel):
    """Strict by intent: an unknown field is an error, never silently ignored."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        populate_by_name=True,
    )
