"""What an evaluation begins with: the adapter it is of, or the answers that are judged anew.

Either is copied into the new job's run directory like the checkpoint that a fork starts from
(`service.jobs.initial`), and published with it: whatever becomes of the other job cannot take it
away, and the worker may be on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.checks import read_card
from bridge_engine.evaluation.presets import AdapterCard
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.spec.errors import FieldError
from bridge_engine.state.initial_parameters import FOLDER
from service.adapters.files import adapter_folder
from service.adapters.names import look_up, nearest
from service.artifacts import Damaged
from service.errors import ApiError, invalid_fields
from service.jobs import initial
from service.settings import Settings
from service.store import AdapterRow, JobRow, NotFound, Store


@dataclass(frozen=True)
class Beginning:
    """What has to lie in the run directory before the engine starts."""

    folder: Path | None = None
    """None: nothing, the base model alone is asked."""
    card: AdapterCard | None = None
    """Of the adapter."""


def located(
    spec: EvaluationSpec, store: Store, settings: Settings, source: JobRow | None = None
) -> tuple[EvaluationSpec, Beginning]:
    """The spec with the adapter's name for ever, and what it begins with.

    A fork of the evaluation `source` begins with what that one has, whatever became of the adapter.
    Raises `ApiError` 422 where there is no such adapter or evaluation, 503 where the artifact store
    does not answer.
    """
    if spec.completions_of is not None:
        return spec, Beginning(_answers(spec, store, settings))
    if spec.adapter is None:
        return spec, Beginning()
    name, folder = spec.adapter, _copy_of(spec.adapter, source, store, settings)
    try:
        if folder is None:
            adapter = _adapter(name, store)
            name, folder = adapter.name, adapter_folder(adapter, store, settings)
        if not folder.is_dir():
            gone = f"the files of adapter {name} were deleted; name another one"
            raise _refusal("adapter", "adapter_gone", gone, name)
        card = read_card(folder)
    except (Damaged, EngineError) as error:
        raise _refusal("adapter", "adapter_damaged", error.message, name) from None
    return spec.model_copy(update={"adapter": name}), Beginning(folder, card)


def _copy_of(name: str, source: JobRow | None, store: Store, settings: Settings) -> Path | None:
    """The adapter of this name as an evaluation of it has it; None if `source` is none."""
    if source is None or source.spec.get("adapter") != name or source.spec["completions_of"]:
        return None
    return initial.brought(source.id, FOLDER, store, settings)


def finished(job: JobRow, param: str | None = None) -> None:
    """Refuses a job that is no evaluation, or has no result yet: `ApiError` 422 where `param` named
    it, 409 where it was the one asked for."""
    if job.kind != "eval":
        code, why = "not_an_evaluation", f"job {job.id} is one of training and has no scores"
    elif not job.result:
        code = "evaluation_not_finished"
        why = f"evaluation {job.id} is {job.status}: its scores come when it succeeds"
    else:
        return
    raise ApiError(409, code, why) if param is None else _refusal(param, code, why, job.id)


def checkpoint_folder(job: JobRow, store: Store, settings: Settings) -> Path:
    """Where a finished evaluation's answers and verdicts lie, fetched if need be; `ApiError` 409 if
    they are gone."""
    rows = store.checkpoints(job.id)
    folder = initial.brought(job.id, rows[-1].path, store, settings) if rows else None
    if folder is None:
        gone = f"the answers of evaluation {job.id} are not there any more; run it again"
        raise ApiError(409, "completions_gone", gone)
    return folder


def _answers(spec: EvaluationSpec, store: Store, settings: Settings) -> Path:
    job_id = str(spec.completions_of)
    try:
        source = store.get_job(job_id)
    except NotFound as error:
        raise _refusal("completions_of", "unknown_job", error.message, job_id) from None
    finished(source, "completions_of")
    asked, now = EvaluationSpec.model_validate(source.spec), spec.model_dump()
    for field in ("model", "adapter", "benchmarks", "sampling", "template", "seed"):
        if now[field] != asked.model_dump()[field]:
            why = f"the answers of {job_id} were given to another {field}: grade them as they are, "
            raise _refusal(
                field, "completions_do_not_fit", why + "by POST /jobs/ID/regrade", job_id
            )
    return checkpoint_folder(source, store, settings)


def _adapter(name: str, store: Store) -> AdapterRow:
    try:
        return look_up(store, name)
    except NotFound as error:
        near = nearest(store, name)
        hint = f"; did you mean {near!r}?" if near else ""
        message = error.message + hint
        field = FieldError("adapter", "unknown_adapter", message, given=name, nearest=near)
        raise invalid_fields([field]) from None


def _refusal(param: str, code: str, message: str, given: str) -> ApiError:
    return invalid_fields([FieldError(param, code, message, given=given)])
