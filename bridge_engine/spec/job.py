"""What POST /jobs accepts: a training job, or with `kind: eval` an evaluation. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.checks import check_evaluation, fill_evaluation
from bridge_engine.evaluation.presets import AdapterCard
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.spec.checks import check_spec, fill_defaults
from bridge_engine.spec.errors import FieldError, field_errors, unknown_name
from bridge_engine.spec.train import TrainSpec

JobSpec = TrainSpec | EvaluationSpec

KINDS: Mapping[str, type[TrainSpec] | type[EvaluationSpec]] = {
    "train": TrainSpec,
    "eval": EvaluationSpec,
}


class InvalidSpec(EngineError):
    """A document that is no spec, with every field at fault."""

    def __init__(self, errors: list[FieldError]) -> None:
        super().__init__(errors[0].message, code=errors[0].code, param=errors[0].param)
        self.errors = errors


def parse_spec(document: Mapping[str, Any]) -> JobSpec:
    """The spec in a document of fields, which is one of training unless its `kind` says otherwise.

    Raises InvalidSpec.
    """
    kind = document.get("kind", "train")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise InvalidSpec([unknown_name("kind", "job kind", str(kind), KINDS)])
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InvalidSpec(field_errors(error, model)) from None


def check(spec: JobSpec, card: AdapterCard | None = None) -> list[FieldError]:
    """Everything wrong about the names in a spec; `card` is that of the adapter it evaluates."""
    if isinstance(spec, EvaluationSpec):
        return check_evaluation(spec, card)
    return check_spec(spec)


def fill(spec: JobSpec, card: AdapterCard | None = None) -> JobSpec:
    """The defaults of a spec in which `check` has found nothing wrong."""
    if isinstance(spec, EvaluationSpec):
        return fill_evaluation(spec, card)
    return fill_defaults(spec)
