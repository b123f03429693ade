"""Trying again while the artifact store is out of reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from bridge_engine.errors import EngineError
from service.artifacts import ArtifactsUnavailable
from worker import log

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between tries."""
LOOK = 0.1
"""Seconds between looks whether there is still any use in trying."""


class Patience:
    """Tries for so many seconds, as long as nobody has given up."""

    def __init__(self, seconds: float, given_up: Callable[[], bool]) -> None:
        self.seconds = seconds
        self.given_up = given_up

    def __call__(self, work: Callable[[], T]) -> T:
        """What the work answers. Raises EngineError (`artifacts_unavailable`) when it ends."""
        until, pause, quiet = time.monotonic() + self.seconds, FIRST_PAUSE, False
        while True:
            try:
                answer = work()
            except ArtifactsUnavailable as error:
                if self.given_up() or time.monotonic() + pause > until:
                    raise EngineError(
                        f"{error.message}; tried for {self.seconds:.0f} s",
                        code="artifacts_unavailable",
                        category="infra",
                        retryable=True,
                    ) from error
                if not quiet:
                    log.warning("artifacts wait", because=error.message)
                quiet = True
                self._wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                if quiet:
                    log.info("the artifact store answers again")
                return answer

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.given_up():
            time.sleep(LOOK)
