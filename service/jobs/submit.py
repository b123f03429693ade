"""From a posted body to a spec that can run: validated, names looked up, every default filled."""

from __future__ import annotations

from bridge_engine import catalog
from bridge_engine.errors import EngineError
from bridge_engine.spec import JobSpec, TrainSpec
from bridge_engine.spec_errors import FieldError
from service.body import parse
from service.errors import invalid_fields
from service.jobs.estimate import Estimates, estimate


def resolved(body: tuple[bytes, str]) -> TrainSpec:
    """The spec in the body. `ApiError` 400, 413 or 415 when it cannot be read; 422 with every field
    at fault when it cannot run."""
    spec = parse(body, JobSpec, allow_yaml=True)
    errors = catalog.check_spec(spec)
    if errors:
        raise invalid_fields(errors)
    try:
        return catalog.resolve_spec(spec)
    except EngineError as error:  # a dataset that went away between the two looks
        field = FieldError(error.param or "data", error.code, error.message)
        raise invalid_fields([field]) from error


def estimated(spec: TrainSpec) -> Estimates:
    """What a resolved spec will cost."""
    return estimate(spec, catalog.resolve_model(spec.model))


EXAMPLES = {
    "bridge": {
        "summary": "BRIDGE: imitation and exploration joined by the cooperative gain",
        "value": {
            "name": "first steps",
            "method": {"name": "bridge", "lambda": 0.5},
            "model": "bridge-tiny",
            "data": {"prompts": "arithmetic", "demos": "arithmetic/demos", "eval": "arithmetic"},
            "steps": 100,
        },
    },
    "rl": {
        "summary": "GRPO from the base model: no demonstrations",
        "value": {
            "method": "rl",
            "model": "bridge-tiny",
            "data": {"prompts": "arithmetic", "eval": "arithmetic/dev"},
            "steps": 100,
            "rollout": {"prompts_per_step": 8, "group_size": 8},
        },
    },
    "sft": {
        "summary": "Supervised fine-tuning on the demonstrations alone",
        "value": {
            "method": "sft",
            "model": "bridge-tiny",
            "data": {"demos": "arithmetic", "eval": "arithmetic/dev"},
            "steps": 100,
            "sft": {"batch_size": 16},
        },
    },
}
"""Bodies of POST /jobs, for the API's description."""
