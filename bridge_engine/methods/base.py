"""What a method is: which parameter sets it trains, and how one step moves them.

A method sees its world through two things. `Objectives.gradient` answers with exact gradients of
any weighted sum of J_SFT and J_RL at (θ or θ̂, w); `ParameterSet.ascend` moves a set along one.
It knows nothing of tokens, models or rollouts, so a method is a page of mathematics, and the tests
run that very page on problems small enough to solve by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from bridge_engine.method_options import Options
from bridge_engine.objectives import Metrics
from bridge_engine.vector import Vector


@dataclass
class Gradient:
    """∇ of an objective at (θ, w): one part for each parameter set, and the objective's figures."""

    theta: Vector
    w: Vector | None
    """None where the method has no teacher."""
    metrics: Metrics = field(default_factory=dict)
    """`sft/nll` where J_SFT was asked for; `objective` (J_RL), `clip_ratio` and `logprob_drift`
    (mean |log π − log π_behaviour|) where J_RL was."""

    def figures(self, who: str) -> Metrics:
        """The figures under the name of the parameter set they belong to."""
        return {k if "/" in k else f"{k}/{who}": v for k, v in self.metrics.items()}


class Objectives(Protocol):
    """One step's data: a batch of demonstrations and a batch of rollouts from the policy."""

    def gradient(self, theta: str, *, sft: float = 0.0, rl: float = 0.0) -> Gradient:
        """∇ [ sft · J_SFT(θ,w) + rl · J_RL(θ,w) ] with θ the named set (`student` or `shadow`).

        An objective of weight 0 is not computed at all. All gradients of a step are taken at the
        parameters before the step.
        """
        ...


class Movable(Protocol):
    """A parameter set that can be moved."""

    def ascend(self, gradient: Vector, learning_rate: float | None = None) -> float:
        """Moves along the gradient, at the set's own rate unless told another; returns its norm."""
        ...

    def restart(self) -> None:
        """Forgets the optimiser's moments and its warmup, keeps the parameters."""
        ...


OptionsT = TypeVar("OptionsT", bound=Options)


class Method(ABC, Generic[OptionsT]):
    """One way of combining SFT and RL. `options` says which adapters it trains, and from what."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @abstractmethod
    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        """Takes 0-based step `step` of `steps`; returns its figures."""
