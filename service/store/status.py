"""The states of a job and every way from one to another, in one table."""

from __future__ import annotations

from typing import Final, Literal

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]

TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    "queued": frozenset({"running", "cancelled"}),
    # back to queued: the worker was lost, was told to stop, or its engine was killed
    "running": frozenset({"cancelling", "queued", "succeeded", "failed"}),
    # a run may reach its end, good or bad, before it hears that it should stop
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

STATUSES: Final = tuple(TRANSITIONS)
OWNED: Final[tuple[Status, ...]] = ("running", "cancelling")
"""A worker holds a lease on the job."""
TERMINAL: Final = frozenset(status for status, after in TRANSITIONS.items() if not after)
"""Nothing will ever change again."""


def origins(target: Status) -> tuple[Status, ...]:
    """The states from which `target` can be reached."""
    return tuple(status for status, after in TRANSITIONS.items() if target in after)
