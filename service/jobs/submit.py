"""From a posted body to a spec that can run: validated, names looked up, every default filled."""

from __future__ import annotations

from typing import Any

from bridge_engine.data.fitting import check_asked, check_uploads
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.checks import seen_in_training
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.models import catalog
from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.job import InvalidSpec, JobSpec, check, fill, parse_spec
from bridge_engine.spec.train import TrainSpec
from service.errors import invalid_fields
from service.evaluations import estimate as evaluation_estimate
from service.evaluations import subject
from service.jobs import initial
from service.jobs.estimate import Estimates, estimate
from service.jobs.schemas import DryRun
from service.settings import Settings
from service.store import JobRow, NotFound, Store, StoreUnavailable, new_id
from service.store.models import DEFAULT_PROJECT


def asked_for(document: dict[str, Any]) -> JobSpec:
    """The spec in a document of fields, as it was given; `ApiError` 422 with every field at fault
    when it is none."""
    try:
        return parse_spec(document)
    except InvalidSpec as error:
        raise invalid_fields(error.errors) from None


def _resolved(
    spec: JobSpec, store: Store, settings: Settings, source: JobRow | None = None
) -> tuple[JobSpec, subject.Beginning]:
    """The spec with every default filled in, names looked up; `ApiError` 422 with every field at
    fault when it cannot run."""
    beginning = subject.Beginning()
    if isinstance(spec, EvaluationSpec):
        spec, beginning = subject.located(spec, store, settings, source)
    try:
        errors = check(spec, beginning.card)
        if isinstance(spec, TrainSpec) and (uploaded := _check_uploaded_demos(spec, store)):
            # the engine looked at the first row alone
            errors = [*uploaded, *(e for e in errors if e.code != "no_solutions")]
        if errors:
            raise invalid_fields(errors)
        filled = fill(spec, beginning.card)
        if isinstance(filled, EvaluationSpec):
            errors = check_asked(filled)
        else:
            errors = check_uploads(filled)
        if errors:
            raise invalid_fields(errors)
        return filled, beginning
    except EngineError as error:  # a dataset that went away between two looks
        field = FieldError(error.param or "data", error.code, error.message)
        raise invalid_fields([field]) from error


def tried(
    spec: JobSpec,
    store: Store,
    settings: Settings,
    *,
    source: JobRow | None = None,
    param: str = "init.step",
) -> DryRun:
    """What `create` would make of it; nothing is queued, and the same is refused."""
    spec, beginning = _resolved(spec, store, settings, source)
    warnings: list[str] = []
    if isinstance(spec, EvaluationSpec):
        warnings += seen_in_training(spec, beginning.card).values()
    elif spec.init is not None and not _inherits(spec, source):
        spec, _ = initial.resolve(spec, store, settings, param)
    dumped = spec.model_dump(mode="json", by_alias=True)
    return DryRun(spec=dumped, estimates=estimated(spec, store), warnings=warnings)


def _inherits(spec: TrainSpec, source: JobRow | None) -> bool:
    """Does it start from where the job started that it is forked from?"""
    assert spec.init is not None
    return source is not None and source.spec.get("init") == spec.init.model_dump(mode="json")


def create(
    spec: JobSpec,
    store: Store,
    settings: Settings,
    *,
    idempotency_key: str | None,
    project_id: str = DEFAULT_PROJECT,
    priority: int = 0,
    source: JobRow | None = None,
    param: str = "init.step",
) -> tuple[JobRow, bool]:
    """Queues a job of a spec as it was given; False if a request with this key has made it before.

    One that starts from a checkpoint (`spec.init`), from an adapter or from another evaluation's
    answers gets a copy of it first. `source` is the job it is forked from, and `param` what the
    step was given by. `ApiError` 422 when it cannot run.
    """
    # by its names as they were given: what they stand for may be another one now, or gone
    request: object = spec.model_dump(mode="json", by_alias=True)
    if source is not None:
        request = {"fork": source.id, "spec": request}
    if first := store.same_request(idempotency_key, request):
        return first, False
    spec, beginning = _resolved(spec, store, settings, source)
    job_id = new_id("job")
    run = settings.run_dir(job_id)
    forked_from: tuple[str, int | None] | None = (source.id, None) if source is not None else None
    if isinstance(spec, EvaluationSpec):
        if beginning.folder is not None:
            param = "adapter" if spec.completions_of is None else "completions_of"
            initial.put(beginning.folder, run, param)
    elif spec.init is not None and not (
        source is not None
        and _inherits(spec, source)
        and initial.inherit(spec, source.id, run, store, settings)
    ):
        spec, folder = initial.resolve(spec, store, settings, param)
        initial.put(folder, run)
        assert spec.init is not None
        if source is None or source.id == spec.init.job:
            forked_from = (spec.init.job, int(spec.init.step))
    try:
        begins = initial.published(run, job_id, store, settings)
        job, created = store.create_job(
            spec,
            total_steps=steps_of(spec, store),
            idempotency_key=idempotency_key,
            job_id=job_id,
            project_id=project_id,
            priority=priority,
            forked_from=forked_from,
            request=request,
            artifacts=begins,
        )
    except StoreUnavailable:
        raise  # it may have been written all the same: then its worker needs what lies here
    except BaseException:
        initial.take_back(run, job_id, settings)
        raise
    if not created:
        initial.take_back(run, job_id, settings)
    return job, created


def _check_uploaded_demos(spec: TrainSpec, store: Store) -> list[FieldError]:
    """An uploaded dataset of demonstrations some of which have no solution: the engine would refuse
    it, after having waited in the queue.

    Left to the engine: `kinds` or a part of the upload, which may leave just the others out, and a
    `limit` that the rows with a solution can fill.
    """
    demos = spec.data.demos
    if demos is None or demos.kinds or not demos.name.startswith("ds_"):
        return []
    if demos.split not in (None, "train"):
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


def steps_of(spec: JobSpec, store: Store) -> int:
    """Steps of the whole job: of optimisation, or problems, as far as they are known."""
    if isinstance(spec, EvaluationSpec):
        return evaluation_estimate.problems(spec, store)
    return spec.steps


def estimated(spec: JobSpec, store: Store) -> Estimates:
    """What a resolved spec will cost."""
    model = catalog.resolve_model(spec.base)
    if isinstance(spec, EvaluationSpec):
        return evaluation_estimate.estimate(spec, model, store)
    return estimate(spec, model)


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
    "eval": {
        "summary": "Evaluation of a base model or an adapter on benchmarks",
        "value": {
            "kind": "eval",
            "model": "bridge-tiny",
            "benchmarks": [{"name": "arithmetic", "limit": 100}],
            "sampling": {"samples": 4, "temperature": 1.0},
        },
    },
}
"""Bodies of POST /jobs, for the API's description."""
