"""What a finished evaluation says, alone or against another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, TypeAdapter

from bridge_engine.evaluation.answers import PROBLEMS
from bridge_engine.evaluation.comparison import Difference, difference
from bridge_engine.evaluation.report import EvaluationResult, ProblemScore, SetReport
from bridge_engine.spec.errors import FieldError
from service.errors import invalid_fields
from service.evaluations.subject import checkpoint_folder, finished
from service.settings import Settings
from service.store import JobRow, Store

_problems: TypeAdapter[list[ProblemScore]] = TypeAdapter(list[ProblemScore])
_Problems: TypeAlias = dict[str, list[ProblemScore]]
"""How the problems of each set went."""
_Pairs: TypeAlias = list[tuple[SetReport, SetReport]]
_OF_THE_JOB = ("grader", "seed", "engine")
_OF_A_SET = ("temperature", "top_p", "max_new_tokens", "template", "samples")
"""What two evaluations should have in common, for a difference to be the models'."""


class Comparison(BaseModel):
    """This evaluation against another one, paired by problem."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: str
    """The other one."""
    model: str
    adapter: str | None
    benchmarks: dict[str, Difference]
    """In pass@1, by our set's name; sets of which both know no problem are left out."""
    others: dict[str, dict[str, Difference]]
    """In the other scores that both have, pass@k and maj@k: by our set's name, and then theirs."""
    settings: dict[str, tuple[Any, Any]]
    """What was set otherwise, ours and theirs: such a difference is not the models' alone."""


class Scores(EvaluationResult):
    """The scores of an evaluation."""

    job_id: str
    against: Comparison | None = None


def scores(job: JobRow) -> Scores:
    """The evaluation's own; `ApiError` 422 for a job that has none."""
    finished(job)
    engine = job.spec.get("sampling", {}).get("engine", "native")  # older results do not say
    return Scores.model_validate({"engine": engine, **(job.result or {}), "job_id": job.id})


def compared(job: JobRow, other: JobRow, store: Store, settings: Settings) -> Scores:
    """The same, against another evaluation; `ApiError` 422 where nothing can be paired."""
    finished(job)
    finished(other, "against")
    ours, theirs = scores(job), scores(other)
    mine, their = (_of_problems(checkpoint_folder(j, store, settings)) for j in (job, other))
    pairs = _pairs(ours.benchmarks, theirs.benchmarks)
    found = {
        one.name: apart
        for one, another in pairs
        if (apart := difference(mine[one.name], their[another.name], seed=ours.seed))
    }
    if not found:
        sets = ", ".join(their) or "no set"
        why = f"{job.id} and {other.id} have no problem in common; {other.id} was asked {sets}"
        raise invalid_fields([FieldError("against", "nothing_in_common", why, given=other.id)])
    return ours.model_copy(
        update={
            "against": Comparison(
                job_id=other.id,
                model=theirs.model,
                adapter=theirs.adapter,
                benchmarks=found,
                others=_others(ours, pairs, mine, their),
                settings=_settings(ours, theirs, [p for p in pairs if p[0].name in found]),
            )
        }
    )


def _others(
    ours: Scores, pairs: _Pairs, mine: _Problems, their: _Problems
) -> dict[str, dict[str, Difference]]:
    found = {
        one.name: {
            score: apart
            for score in one.scores
            if score != "pass@1" and not score.startswith("avg@") and score in another.scores
            if (apart := difference(mine[one.name], their[another.name], score, seed=ours.seed))
        }
        for one, another in pairs
    }
    return {name: differences for name, differences in found.items() if differences}


def _of_problems(folder: Path) -> _Problems:
    content = json.loads((folder / PROBLEMS).read_text(encoding="utf-8"))
    return {name: _problems.validate_python(each["problems"]) for name, each in content.items()}


def _pairs(ours: list[SetReport], theirs: list[SetReport]) -> _Pairs:
    """The sets of both. The split stands in a label only where an evaluation has several."""
    known = {(_set_name(one), one.split): one for one in theirs}
    return [(one, known[key]) for one in ours if (key := (_set_name(one), one.split)) in known]


def _set_name(one: SetReport) -> str:
    return one.name.removesuffix(f":{one.split}")


def _settings(ours: Scores, theirs: Scores, sets: _Pairs) -> dict[str, tuple[Any, Any]]:
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(ours, name), getattr(theirs, name)) for name in _OF_THE_JOB
    }
    for one, another in sets:
        for field in _OF_A_SET:
            pairs[f"benchmarks.{one.name}.{field}"] = getattr(one, field), getattr(another, field)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
