"""A job that starts from another one's checkpoint: which checkpoint, whether it fits, and a copy.

The copy is made before the job is there, so that nothing that becomes of the other job can take it
away between the request and the start. Its files are hard links where the file system has them:
a published checkpoint is never changed, only deleted, and the last name keeps the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from bridge_engine.initial_parameters import FOLDER, unfit
from bridge_engine.spec import InitSpec, TrainSpec
from bridge_engine.spec_errors import FieldError
from service.errors import ApiError, invalid_fields
from service.settings import Settings
from service.store import JobRow, NotFound, Store

MANIFEST = "manifest.json"
"""Written last into a checkpoint: where it is, the checkpoint is whole."""


def resolve(
    spec: TrainSpec, store: Store, settings: Settings, param: str = "init.step"
) -> tuple[TrainSpec, Path]:
    """The spec with the step's number in `init`, and where that checkpoint lies.

    Raises `ApiError` 422 if there is no such job or checkpoint, or if it does not fit; `param` is
    what was given the step by.
    """
    assert spec.init is not None
    try:
        source = store.get_job(spec.init.job)
    except NotFound as error:
        raise invalid_fields(
            [FieldError("init.job", "unknown_job", error.message, given=error.id)]
        ) from None
    step, folder = _checkpoint(source, spec.init, store, settings, param)
    if errors := unfit(TrainSpec.model_validate(source.spec), spec):
        raise invalid_fields(errors)
    return spec.model_copy(update={"init": InitSpec(job=source.id, step=step)}), folder


def _checkpoint(
    source: JobRow, init: InitSpec, store: Store, settings: Settings, param: str
) -> tuple[int, Path]:
    run = settings.run_dir(source.id)
    saved = {row.step: run / row.path for row in store.checkpoints(source.id)}
    there = [step for step, folder in saved.items() if (folder / MANIFEST).is_file()]
    step = {"best": source.best_step, "latest": source.checkpoint_step}.get(str(init.step))
    if isinstance(init.step, int):
        step = init.step
    if step in there:
        return step, saved[step]
    steps = ", ".join(map(str, there))
    instead = f"there are those of steps {steps}" if there else "it has none now"
    if step is None and init.step == "best":
        code, why = "no_best_checkpoint", f"no accuracy of job {source.id} was measured"
    elif step is None or step not in saved:
        code, why = "unknown_checkpoint", f"job {source.id} has no checkpoint {init.step!r}"
    else:
        code, why = "checkpoint_gone", f"the checkpoint of step {step} of {source.id} was deleted"
    raise invalid_fields(
        [
            FieldError(
                param, code, f"{why}; {instead}", given=init.step, allowed=[str(s) for s in there]
            )
        ]
    )


def put(folder: Path, run: Path) -> None:
    """Puts the checkpoint into the run directory of a job that is to start from it.

    Raises `ApiError` 422 (`checkpoint_gone`) if it is deleted at this moment, 507 on a full disk.
    """
    target = run / FOLDER
    target.mkdir(parents=True)
    try:
        for file in sorted(folder.iterdir()):
            _link(file, target / file.name)
        if not (target / MANIFEST).is_file():
            raise FileNotFoundError(folder)
    except FileNotFoundError:
        shutil.rmtree(run, ignore_errors=True)
        gone = "the checkpoint was deleted while it was copied; name another step"
        raise invalid_fields([FieldError("init.step", "checkpoint_gone", gone)]) from None
    except OSError as error:
        shutil.rmtree(run, ignore_errors=True)
        raise ApiError(
            507, "disk_full", f"the checkpoint cannot be copied ({error.strerror}); free some space"
        ) from None


def inherit(spec: TrainSpec, source: Path, run: Path) -> bool:
    """Puts there what the job in `source` itself started from; False if that is not there.

    Raises `ApiError` 422 if it does not fit.
    """
    try:
        state = json.loads((source / FOLDER / "state.json").read_text())
    except (OSError, ValueError):
        return False
    if errors := unfit(TrainSpec.model_validate(state["spec"]), spec):
        raise invalid_fields(errors)
    put(source / FOLDER, run)
    return True


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(file, target)
