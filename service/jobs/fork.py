"""A new job out of a job's spec, with changes, from its beginning or from a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.job import JobSpec
from bridge_engine.spec.train import CheckpointStep
from service.body import parse
from service.errors import invalid_fields
from service.jobs import submit
from service.store import JobRow

Priority = Annotated[int, Field(ge=-100, le=100)]


class ForkRequest(BaseModel):
    """What the new job does otherwise. An empty body makes the same job once more."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    overrides: dict[str, Any] = Field(
        default_factory=dict, examples=[{"steps": 200, "optimizer": {"student_lr": 1e-4}}]
    )
    """Changes of the spec, as a JSON merge patch (RFC 7396): null takes a field back to its
    default, a text or a list replaces what was there. The spec is the resolved one: defaults that
    were filled in are part of it."""
    from_checkpoint: CheckpointStep | None = None
    """The checkpoint whose parameters the new job starts from, with fresh optimisers and at a step
    0 of its own; default: from where this job started."""
    priority: Priority | None = None
    """Default: that of this job."""


def requested(body: tuple[bytes, str]) -> ForkRequest:
    """The body, which may be empty."""
    return parse(body, ForkRequest) if body[0].strip() else ForkRequest()


def forked(source: JobRow, request: ForkRequest) -> JobSpec:
    """The new job's spec. `ApiError` 422 if it is none.

    Its `init` is where it starts from, the checkpoint's step as it was asked for.
    """
    document = merge_patch(source.spec, request.overrides)
    if request.from_checkpoint is not None:
        if source.kind != "train":
            why = "an evaluation has no parameters to start from; leave from_checkpoint out"
            raise invalid_fields([FieldError("from_checkpoint", "not_a_training_job", why)])
        document["init"] = {"job": source.id, "step": request.from_checkpoint}
    return submit.asked_for(document)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged
