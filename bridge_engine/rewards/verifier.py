"""The verifier: is a completion's stated answer the right one?

Fast path first, mathematics in killable processes for the rest. A run whose answers are plain
numbers never starts a process and never imports sympy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal

from bridge_engine.rewards import compare, fast
from bridge_engine.rewards.extract import clean, stated_answer
from bridge_engine.rewards.findings import SENTENCES
from bridge_engine.rewards.pool import MEMORY_BYTES, Pool, Question

LONGEST_ANSWER = 10_000
"""Characters of a stated answer. Longer ones are unjudged at once: no gold answer is near it, and
reading them takes math-verify minutes."""

LONGEST_HERE = 1_000
"""Characters of an answer that is taken apart in this process rather than in a killable one."""

MEASURED = 0.01
"""Relative tolerance of a measured number where none is given: one part in a hundred."""

VERSION = "2"
"""Raised whenever a verdict changes, so that scores can say by which rules they came about."""


@dataclass(frozen=True, slots=True)
class Case:
    """A completion to judge, with all that may be known about it."""

    gold: str
    text: str
    """The whole completion."""
    prompt: str | None = None
    """Where it repeats this, what it repeats is not its answer."""
    gold_value: float | None = None
    """The gold answer as a number that was measured: compared within `tolerance`."""
    tolerance: float | None = None
    """Relative. Default: MEASURED with a `gold_value`, else none, and numbers are exact."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one completion."""

    value: bool | None
    """True right, False wrong, None unjudged: to be left out, never to be counted as wrong."""
    reason: str
    """A stable word of `bridge_engine.rewards.findings.SENTENCES`."""
    fast: bool
    """Judged without mathematics."""

    @property
    def name(self) -> Literal["right", "wrong", "unjudged"]:
        """The verdict as a word."""
        return "unjudged" if self.value is None else "right" if self.value else "wrong"

    @property
    def sentence(self) -> str:
        """The reason for a person."""
        return SENTENCES.get(self.reason, self.reason)


class Verifier:
    """Judges completions, each within `timeout_s` seconds of computing. A context manager; not for
    two threads.

    `workers` processes judge side by side what the fast path leaves to mathematics.
    """

    def __init__(
        self, timeout_s: float = 5.0, workers: int = 1, *, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._pool = Pool(timeout_s, workers=workers, memory_bytes=memory_bytes)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the judging processes; the next call to `judge` would start new ones."""
        self._pool.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the judging processes alive now."""
        return self._pool.pids

    def judge(self, pairs: Sequence[tuple[str, str] | Case]) -> list[Verdict]:
        """One verdict for each pair (gold answer, completion), in order."""
        cases = [pair if isinstance(pair, Case) else Case(*pair) for pair in pairs]
        asked = [_question(case) for case in cases]
        # Each question once: a group of samples often states the same answer many times.
        questions = dict.fromkeys(q for q in asked if isinstance(q, Question))
        plain = {q: verdict for q in questions if (verdict := _at_a_glance(q)) is not None}
        hard = [question for question in questions if question not in plain]
        judged = zip(hard, self._pool.judge(hard), strict=True)
        verdicts = plain | {q: Verdict(j.value, j.reason, fast=False) for q, j in judged}
        return [q if isinstance(q, Verdict) else verdicts[q] for q in asked]


def _question(case: Case) -> Verdict | Question:
    """What there is to judge, or the verdict where that is nothing."""
    want = clean(case.gold)
    tolerance = case.tolerance
    if case.gold_value is not None:
        want = repr(case.gold_value)
        tolerance = MEASURED if tolerance is None else tolerance
    if not want:
        return Verdict(None, "empty_gold", fast=True)
    stated = stated_answer(case.text, case.prompt)
    if stated is None:
        return Verdict(False, "no_answer", fast=True)
    return Question(want, stated, tolerance)


def _at_a_glance(question: Question) -> Verdict | None:
    """The verdict where it takes no mathematics."""
    want, stated, tolerance = question.gold, question.stated, question.tolerance
    if max(len(want), len(stated)) > LONGEST_HERE:
        if want == stated:
            return Verdict(True, "equal", fast=True)
        return Verdict(None, "too_long", fast=True) if len(stated) > LONGEST_ANSWER else None
    found = compare.judge(want, stated, partial(fast.leaf, tolerance=tolerance))
    return None if found.deferred else Verdict(found.value, found.reason, fast=True)
