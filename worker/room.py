"""Is there room on this machine's disk for what a job will save?"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from bridge_engine.errors import EngineError
from bridge_engine.models import catalog
from bridge_engine.models.shapes import shape_of
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import SPARE_BYTES
from bridge_engine.state.sizes import checkpoint_bytes
from service.store import JobRow

MIB = 2**20


def check_room(run: Path, job: JobRow) -> None:
    """Raises EngineError (`disk_full`) where not even one checkpoint of the job has room: it would
    be found out after the first steps. What the model's config does not tell is left to the engine,
    which looks before each save."""
    try:
        spec = TrainSpec.model_validate(job.spec)
        shape = shape_of(catalog.resolve_model(spec.model))
    except (ValidationError, EngineError, OSError):
        return  # the engine says it better
    if shape is None:
        return
    needed = checkpoint_bytes(spec, shape) + SPARE_BYTES
    free = shutil.disk_usage(run).free
    if free < needed:
        raise EngineError(
            f"the disk under {run} has {free / MIB:.0f} MiB free, and one checkpoint of this job "
            f"needs {needed / MIB:.0f} MiB ({SPARE_BYTES / MIB:.0f} MiB of them to spare); free "
            "some space, or set BRIDGE_HOME to a larger disk, and run the job again",
            code="disk_full",
            category="infra",
            retryable=True,
        )
