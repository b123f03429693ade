"""Where POST /graders/run judges: killable processes that start with the first request that needs
them and are shared by the next ones. The API's own process computes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from bridge_engine.errors import EngineError
from bridge_engine.rewards.graders import GraderSpec, grade
from bridge_engine.rewards.verifier import Case, Verdict, Verifier
from service.errors import ApiError

ANSWER_SECONDS = 2.0
"""One answer may take so long to be judged."""
REQUEST_SECONDS = 60.0
"""All the answers of one request; what is left then is unjudged."""
WAIT_SECONDS = 5.0
"""How long a request waits for the one before it."""
CHUNK = 20
"""Answers judged between two looks at the clock."""


class GradingBench:
    """Judges for one request at a time. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verifier = Verifier(ANSWER_SECONDS, workers=1)

    def run(self, grader: GraderSpec, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict a case, in order. `ApiError` (429) while another request is judged."""
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise ApiError(
                429,
                "too_many_gradings",
                "another request is being graded; try again in a few seconds, or grade on your own "
                "machine with `bridge grade`",
                headers={"Retry-After": "5"},
            )
        try:
            return self._judge(grader, cases)
        except EngineError as error:  # the judging processes do not start
            raise ApiError(503, error.code, error.message, headers={"Retry-After": "5"}) from error
        finally:
            self._lock.release()

    def _judge(self, grader: GraderSpec, cases: Sequence[Case]) -> list[Verdict]:
        deadline = time.monotonic() + REQUEST_SECONDS
        found: list[Verdict] = []
        for start in range(0, len(cases), CHUNK):
            chunk = cases[start : start + CHUNK]
            if time.monotonic() >= deadline:
                found += [Verdict(None, "request_timed_out", fast=True) for _ in chunk]
            else:
                found += grade(grader, chunk, self._verifier)
        return found

    def close(self) -> None:
        """Ends the judging processes."""
        with self._lock:
            self._verifier.close()
