"""What can go wrong between a program and the service, as exceptions that say what to do."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any


class BridgeError(Exception):
    """Whatever the client raises about the service."""


class ConnectionError(BridgeError, builtins.ConnectionError):
    """The service could not be reached, or went away, and trying again did not help."""

    def __init__(self, base_url: str, cause: object, sentence: str | None = None) -> None:
        super().__init__(
            sentence
            or f"no Bridge service answers at {base_url} ({cause}); start one with `bridge up`, "
            "or say where it is with BRIDGE_URL"
        )
        self.base_url = base_url

    @classmethod
    def silent(cls, base_url: str) -> ConnectionError:
        """It took the request and did not answer in time."""
        return cls(
            base_url,
            "ReadTimeout",
            f"the service at {base_url} took the request and did not answer in time; it may be "
            "busy: look at its log, try again, or wait longer with Client(timeout=SECONDS)",
        )


class APIStatusError(BridgeError):
    """The service understood the request and refused it (RFC 9457 problem details).

    `code` is a stable snake_case word, `param` the dotted path of the field at fault, `errors`
    every problem found when there is more than one, `request_id` what the service's log calls the
    request.
    """

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.code: str = problem.get("code") or f"http_{status}"
        self.param: str | None = problem.get("param")
        self.title: str = problem.get("title") or ""
        self.detail: str = problem.get("detail") or self.title or f"HTTP status {status}"
        self.request_id: str | None = problem.get("request_id")
        self.errors: list[dict[str, Any]] = list(problem.get("errors") or [])
        self.problem = dict(problem)
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        where = f" [{self.param}]" if self.param and self.param not in self.detail else ""
        request = f", request {self.request_id}" if self.request_id else ""
        return f"{self.detail}{where} ({self.code}, HTTP {self.status}{request})"


class CannotStartError(Exception):
    """Why no service can be started here, in a sentence; `status` is the command's exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class UsageError(BridgeError, ValueError):
    """What the caller gave cannot be sent: an address, an id, a header or a text that is none."""


class SpecError(UsageError):
    """A job spec that cannot be sent: the file is unreadable or is no mapping."""
