"""The verifier: is a completion's stated answer the right one?

Fast path first, math-verify in killable processes for the rest. A run whose answers are plain
numbers never starts a process and never imports sympy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from bridge_engine.rewards import fast
from bridge_engine.rewards.extract import clean, stated_answer
from bridge_engine.rewards.pool import MEMORY_BYTES, Judgement, Pool, Question

LONGEST_ANSWER = 10_000
"""Characters of a stated answer. Longer ones are unjudged at once: no gold answer is near it, and
reading them takes math-verify minutes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one completion."""

    value: bool | None
    """True right, False wrong, None unjudged: to be left out, never to be counted as wrong."""
    reason: str
    fast: bool
    """Judged without mathematics."""


class Verifier:
    """Judges completions, each within `timeout_s` seconds. A context manager; not for two threads.

    `workers` processes judge side by side what the fast path leaves to math-verify.
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

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each pair (gold answer, completion), in order."""
        looked_at = [_without_mathematics(gold, completion) for gold, completion in pairs]
        # Each question once: a group of samples often states the same answer many times.
        hard = list(dict.fromkeys(q for q in looked_at if isinstance(q, Question)))
        answers = dict(zip(hard, self._pool.judge(hard), strict=True))
        return [q if isinstance(q, Verdict) else _verdict(answers[q]) for q in looked_at]


def _verdict(judgement: Judgement) -> Verdict:
    return Verdict(judgement.value, judgement.reason, fast=False)


def _without_mathematics(gold: str, completion: str) -> Verdict | Question:
    """The verdict where it is plain, else the question to ask."""
    want = clean(gold)
    if not want:
        return Verdict(None, "the gold answer is empty", fast=True)
    stated = stated_answer(completion)
    if stated is None:
        return Verdict(False, "no answer stated", fast=True)
    value = fast.judge(want, stated)
    if value is not None:
        return Verdict(value, "equal" if value else "another number", fast=True)
    if len(stated) > LONGEST_ANSWER:
        return Verdict(None, f"an answer of {len(stated)} characters is not judged", fast=True)
    return Question(want, stated)
