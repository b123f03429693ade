"""Where the answers of an evaluation are kept: its run directory, and its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_engine.distributed.ranks import World
from bridge_engine.evaluation.answers import (
    COMPLETIONS,
    PROBLEMS,
    KeptAnswers,
    source_of,
    source_of_others,
)
from bridge_engine.evaluation.report import problem_scores
from bridge_engine.evaluation.sets import AskedSet
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.state.checkpoint import (
    MANIFEST,
    newest_whole,
    prune,
    publish,
    set_aside,
    sha256_of,
    sweep,
)
from bridge_engine.state.initial_parameters import FOLDER


def kept_answers(
    spec: EvaluationSpec,
    directory: Path,
    data: Sequence[str],
    environment: Mapping[str, Any],
    world: World,
) -> KeptAnswers:
    """The answers that are there: of this directory, of its newest checkpoint, or of the evaluation
    that is graded anew. Every rank has them; rank 0 writes.

    `data` are the hashes of the sets. EngineError (`spec_changed`) where they answer others.
    """
    beginning, checkpoints = directory / FOLDER, directory / "checkpoints"
    if spec.completions_of is None:
        manifest = beginning / MANIFEST
        adapter = sha256_of(manifest) if manifest.is_file() else None
        source = source_of(spec, data, adapter)
    else:
        source, environment = source_of_others(spec, data, beginning / COMPLETIONS)

    def bring() -> None:
        sweep(checkpoints)
        folder, torn = newest_whole(checkpoints)
        for damaged in torn:
            set_aside(damaged)
        kept = KeptAnswers(directory / COMPLETIONS, source, environment)
        if folder is not None:
            kept.take_from(folder / COMPLETIONS)
        if spec.completions_of is not None:
            kept.take_from(beginning / COMPLETIONS)

    world.first(bring)
    return KeptAnswers(directory / COMPLETIONS, source, environment)


def save(folder: Path, kept: KeptAnswers, sets: Sequence[AskedSet]) -> None:
    """Publishes a checkpoint: the answers, and how each problem of each set went."""

    def write(temporary: Path) -> None:
        judged = [one.judged for one in sets]
        kept.write_graded(temporary / COMPLETIONS, judged)
        content = {
            one.label: {
                "data_sha256": one.sha256,
                "problems": [score.model_dump() for score in problem_scores(some)],
            }
            for one, some in zip(sets, judged, strict=True)
        }
        (temporary / PROBLEMS).write_text(json.dumps(content, ensure_ascii=False))

    publish(folder, write, expected_bytes=kept.path.stat().st_size)
    prune(folder.parent, 2)
