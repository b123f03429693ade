"""The rollouts of one problem: what a step explores, and what a method sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bridge_engine.forward.sequences import TokenSequence


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The completions of one prompt, in order, with what the verifier said of each."""

    rollouts: Sequence[TokenSequence]
    rewards: Sequence[float | None]
    """One a rollout; None: could not be judged."""
    truncated: Sequence[bool]
    """One a rollout; True where the completion was cut off at max_new_tokens."""
    demo: int | None = None
    """The place of the problem's demonstration among the run's, where it has one."""
    verdicts: Sequence[bool | None] | None = None
    """One a rollout: is its answer right? None where the rewards are the verdicts themselves."""

    @property
    def right(self) -> int:
        """Answers judged right."""
        if self.verdicts is not None:
            return sum(v is True for v in self.verdicts)
        return sum(r is not None and r > 0 for r in self.rewards)

    @property
    def judged(self) -> int:
        """Answers that could be judged."""
        if self.verdicts is not None:
            return sum(v is not None for v in self.verdicts)
        return sum(r is not None for r in self.rewards)

    @property
    def informative(self) -> bool:
        """Do its rewards differ? Else every advantage is 0."""
        return len({r for r in self.rewards if r is not None}) > 1
