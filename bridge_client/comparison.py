"""Training jobs side by side: which way was best, what did each cost, and were they asked alike?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bridge_client import output
from bridge_client.models import Job
from bridge_client.text import escape
from bridge_client.watch import percent

OWN = ("method", "seed", "name", "resources")
"""What may differ between jobs that are compared."""
SPENT = ("num_rollouts", "num_updates", "seconds")
"""The budgets; see docs/methods.md for why there is more than one."""
SHOWN = 6
"""Fields that are told to differ; the others are counted."""


def line(job: Job) -> dict[str, Any]:
    """What a job has come to; None for what is not known, or not yet."""
    result = job.result or {}
    figures: dict[str, Any] = {**job.latest, **result}
    return {
        "job": job.id,
        "name": job.name,
        "method": job.method,
        "seed": job.spec.get("seed"),
        "status": job.status,
        "step": job.step,
        "steps": job.steps,
        "accuracy_before": result.get("accuracy_before"),
        "accuracy_after": result.get("accuracy_after", job.latest.get("accuracy")),
        "accuracy_after_ci": result.get("accuracy_after_ci"),
        "best_accuracy": result.get("best_accuracy"),
        "best_step": result.get("best_step"),
        **{name: figures.get(name) for name in SPENT},
        "adapter": job.adapter,
    }


def compare(jobs: Sequence[Job]) -> dict[str, Any]:
    """{"jobs": a `line` of each training job, the highest accuracy first; "unlike": each field of
    their specs that should be alike and is not, with the values in that order}."""
    lines = {job.id: line(job) for job in jobs}
    ordered = sorted(jobs, key=lambda job: -_or(lines[job.id]["accuracy_after"], -1.0))
    return {
        "jobs": [lines[job.id] for job in ordered],
        "unlike": unlike([job.spec for job in ordered]),
    }


def unlike(specs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted fields whose values differ between the specs, but for those of `OWN`."""
    flat = [dict(_leaves({k: v for k, v in spec.items() if k not in OWN})) for spec in specs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    found = {name: [fields.get(name) for fields in flat] for name in names}
    return {
        name: values for name, values in found.items() if any(one != values[0] for one in values)
    }


def _leaves(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def show(found: Mapping[str, Any]) -> None:
    """As a table, and a warning where the jobs were not asked alike."""
    columns = ["METHOD", "BEFORE", "AFTER", "95 %", "STEP", "ROLLOUTS", "UPDATES", "SECONDS"]
    rows = [
        [
            escape(one["method"] or ""),
            _percent(one["accuracy_before"]),
            _percent(one["accuracy_after"]),
            _bounds(one["accuracy_after_ci"]),
            f"{one['step']}/{one['steps']}",
            *("" if one[name] is None else f"{one[name]:.0f}" for name in SPENT),
            output.status_cell(one["status"]),
            one["job"],
        ]
        for one in found["jobs"]
    ]
    output.table([*columns, "STATUS", "JOB"], rows)
    different = list(found["unlike"].items())
    if different:
        told = [f"{name} ({', '.join(map(str, values))})" for name, values in different[:SHOWN]]
        more = len(different) - len(told)
        told += [f"and {more} more"] * bool(more)
        output.note(f"not asked alike: {'; '.join(told)}")


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _bounds(interval: Sequence[float | None] | None) -> str:
    if not interval or None in interval:
        return ""
    return f"{100 * _or(interval[0], 0):.1f} to {100 * _or(interval[1], 0):.1f}"


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
