"""The states of a job, every way from one to another, and what each request makes of each."""

from __future__ import annotations

from typing import Final, Literal

Status = Literal[
    "queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"
]
Wanted = Literal["run", "pause", "cancel"]
Request = Literal["pause", "resume", "cancel", "retry"]

TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    "queued": frozenset({"running", "paused", "cancelled"}),
    # back to queued: the worker was lost, was told to stop, or its engine was killed
    "running": frozenset({"pausing", "cancelling", "queued", "succeeded", "failed"}),
    # a run may reach its end, good or bad, before it hears that it should stop
    "pausing": frozenset({"paused", "running", "cancelling", "succeeded", "failed"}),
    "paused": frozenset({"queued", "cancelled"}),
    "cancelling": frozenset({"cancelled", "succeeded", "failed"}),
    "succeeded": frozenset(),
    # by a retry alone
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
}

REQUESTS: Final[dict[Request, dict[Status, Status]]] = {
    "pause": {
        "queued": "paused",
        "running": "pausing",
        "pausing": "pausing",
        "paused": "paused",
    },
    # of a job that is pausing: it has not left yet
    "resume": {
        "paused": "queued",
        "pausing": "running",
        "queued": "queued",
        "running": "running",
    },
    "cancel": {
        "queued": "cancelled",
        "running": "cancelling",
        "pausing": "cancelling",
        "paused": "cancelled",
        "cancelling": "cancelling",
        "cancelled": "cancelled",
        # too late, which is no mistake of who asked
        "succeeded": "succeeded",
        "failed": "failed",
    },
    # a job that was retried and is on its way again may also be asked for once more
    "retry": {"failed": "queued", "cancelled": "queued"},
}
"""What becomes of a job upon a request, by its status; what is not here is refused. Asking twice is
the same as once."""

WANTED: Final[dict[Request, Wanted]] = {
    "pause": "pause",
    "resume": "run",
    "cancel": "cancel",
    "retry": "run",
}

STATUSES: Final = tuple(TRANSITIONS)
OWNED: Final[tuple[Status, ...]] = ("running", "pausing", "cancelling")
"""A worker holds a lease on the job."""
TERMINAL: Final[frozenset[Status]] = frozenset({"succeeded", "failed", "cancelled"})
"""The job is over. Nothing changes any more, unless its owner asks for a retry."""


def origins(target: Status) -> tuple[Status, ...]:
    """The states from which `target` can be reached."""
    return tuple(status for status, after in TRANSITIONS.items() if target in after)


def possible(status: Status) -> list[str]:
    """The requests that change something about a job in this status. A fork leaves it alone, and is
    possible always."""
    moving = [r for r, effects in REQUESTS.items() if effects.get(status, status) != status]
    return [*moving, "fork"]
