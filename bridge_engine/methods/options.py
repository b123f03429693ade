"""What a method says of itself without running: its options, what it learns from and trains.

Torch-free, and so are the pages of the methods: the service validates and estimates by them.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from bridge_engine.spec.base import SpecModel

Source = Literal["demos", "rewards"]
BOTH: frozenset[Source] = frozenset({"demos", "rewards"})


class Turns(NamedTuple):
    """What a step learns from: its place (from 0) among the steps that use demonstrations, and
    among those that explore; None where it does not."""

    demos: int | None
    rewards: int | None


class Options(SpecModel):
    """What all methods have."""

    name: str
    source: ClassVar[str]
    """Where the method is from."""
    learns_from: ClassVar[frozenset[Source]]
    paired: ClassVar[bool] = False
    """True: every problem that is explored comes with its demonstration, so `data.prompts` and
    `data.demos` must hold the same problems; no other demonstrations are drawn."""
    experts: ClassVar[int] = 0
    """Places of a group that its demonstration takes; so many rollouts fewer are sampled."""

    @property
    def optimizers(self) -> dict[str, str]:
        """Further optimisers by name, and the adapter that each of them moves too."""
        return {}

    @property
    def policy(self) -> tuple[str, ...]:
        """The adapters whose sum is the policy: what explores, is evaluated and exported."""
        return ("student",)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return self.policy

    def turns(self, step: int, steps: int) -> Turns:
        """What 0-based `step` of `steps` learns from; by default, all the method learns from."""
        return Turns(
            step if "demos" in self.learns_from and not self.paired else None,
            step if "rewards" in self.learns_from else None,
        )

    def totals(self, steps: int) -> tuple[int, int]:
        """How many of `steps` draw demonstrations, and how many explore."""
        return (
            steps if "demos" in self.learns_from and not self.paired else 0,
            steps if "rewards" in self.learns_from else 0,
        )


class LambdaSchedule(SpecModel):
    """λ over the steps of a run, from one end to the other."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """λ of the first step. 0 is imitation alone."""
    end: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ of the last step. 1 is reinforcement alone."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way between: straight, or slow at both ends."""

    def at(self, step: int, steps: int) -> float:
        """λ of 0-based `step` in a run of `steps`."""
        fraction = step / (steps - 1) if steps > 1 else 1.0
        if self.shape == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return self.start + (self.end - self.start) * fraction


Lambda = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("constant")]
    | Annotated[LambdaSchedule, Tag("schedule")],
    Discriminator(lambda v: "schedule" if isinstance(v, dict | LambdaSchedule) else "constant"),
]


class Weighted(Options):
    """A method that weighs RL against SFT by λ."""

    learns_from = BOTH

    lambda_: Lambda = Field(default=0.5, alias="lambda")
    """Weight of RL against SFT: a constant in 0…1, or {start, end, shape} for a schedule.
    Constants in 0.3…0.7 are robust by the paper's own account."""

    def lambda_at(self, step: int, steps: int) -> float:
        """λ of 0-based `step` in a run of `steps`."""
        if isinstance(self.lambda_, LambdaSchedule):
            return self.lambda_.at(step, steps)
        return self.lambda_
