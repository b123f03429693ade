"""From a posted body to a spec that can run: validated, names looked up, every default filled."""

from __future__ import annotations

from bridge_engine import catalog
from bridge_engine.errors import EngineError
from bridge_engine.spec import JobSpec, TrainSpec
from bridge_engine.spec_checks import check_spec, fill_defaults
from bridge_engine.spec_errors import FieldError
from service.body import parse
from service.errors import invalid_fields
from service.jobs.estimate import Estimates, estimate
from service.store import NotFound, Store


def resolved(body: tuple[bytes, str], store: Store) -> TrainSpec:
    """The spec in the body. `ApiError` 400, 413 or 415 when it cannot be read; 422 with every field
    at fault when it cannot run."""
    spec = parse(body, JobSpec, allow_yaml=True)
    uploaded = _check_uploaded_demos(spec, store)
    errors = check_spec(spec)
    if uploaded:  # the engine looked at the first row alone
        errors = [*uploaded, *(e for e in errors if e.code != "no_solutions")]
    if errors:
        raise invalid_fields(errors)
    try:
        return fill_defaults(spec)
    except EngineError as error:  # a dataset that went away between the two looks
        field = FieldError(error.param or "data", error.code, error.message)
        raise invalid_fields([field]) from error


def _check_uploaded_demos(spec: TrainSpec, store: Store) -> list[FieldError]:
    """An uploaded dataset of demonstrations some of which have no solution: the engine would refuse
    it, after having waited in the queue.

    Left to the engine: `kinds`, which may leave just the others out, and a `limit` that the rows
    with a solution can fill.
    """
    demos = spec.data.demos
    if demos is None or demos.kinds or not demos.name.startswith("ds_"):
        return []
    try:
        dataset = store.get_dataset(demos.name)
    except NotFound:
        return []  # `check_spec` says so
    without = dataset.rows - dataset.with_solution
    wanted = min(demos.limit or dataset.rows, dataset.rows)
    if dataset.with_solution == 0 or wanted <= dataset.with_solution:
        return []
    return [
        FieldError(
            "data.demos",
            "incomplete_solutions",
            f"{without} of the {dataset.rows} rows of {demos.name} ({dataset.name}) have no "
            "solution, so there is nothing to imitate in them; upload the "
            f"{dataset.with_solution} others as a dataset of their own for demos",
            given=demos.name,
        )
    ]


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
