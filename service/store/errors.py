"""What can go wrong at the store, each with a sentence that says what to do."""

from __future__ import annotations

from typing import Any


class StoreError(Exception):
    """Base of everything the store raises on purpose; `message` is a sentence for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(StoreError):
    """There is no such thing: `kind` says of what sort, `id` which one was asked for."""

    def __init__(self, kind: str, id: str, message: str | None = None) -> None:
        super().__init__(message or f"there is no {kind} {id!r}")
        self.kind = kind
        self.id = id


class Conflict(StoreError):
    """The request contradicts what is stored; `code` is a stable snake_case word, `allowed` what
    is possible instead, where that can be listed."""

    def __init__(self, message: str, *, code: str, allowed: list[str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.allowed = allowed


class StaleAttempt(StoreError):
    """Another attempt owns the job now, or it has ended: this one's write was refused."""

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} no longer owns job {job_id}; its write was refused")
        self.job_id = job_id
        self.attempt = attempt


class StoreUnavailable(StoreError):
    """The database cannot do its work now: locked, full, unreachable or not set up.

    `reason` is one of `locked`, `full`, `unreachable`, `readonly`, `not_migrated`, `failed`.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def breakdown(category: str, code: str, message: str) -> dict[str, Any]:
    """A job's `error` for what is the machinery's fault, not the job's: trying again may help.

    `category` is one of `bridge_engine.errors.Category`.
    """
    return {
        "category": category,
        "code": code,
        "message": message,
        "param": None,
        "retryable": True,
    }
