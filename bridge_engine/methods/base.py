"""What a method is: which parameter sets it trains, and how one step moves them.

A method sees its world through two things. `Objectives.gradient` answers with exact gradients of
any weighted sum of J_SFT and J_RL at (θ or θ̂, w); `Movable.ascend` moves a set along one. It knows
nothing of tokens, models or rollouts, so a method is a page of mathematics, and the tests run that
very page on problems small enough to solve by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from bridge_engine.methods.options import Options
from bridge_engine.metrics import Metrics

if TYPE_CHECKING:  # the pages of the methods load no torch: the service reads their options
    from bridge_engine.vector import Vector


@dataclass
class Gradient:
    """∇ of an objective at (θ, w): one part for each parameter set, and the objective's figures."""

    theta: Vector
    w: Vector | None
    """None where the method has no teacher."""
    metrics: Metrics = field(default_factory=dict)
    """`sft/nll` and `sft/entropy` where J_SFT was asked for; `objective` (J_RL), `clip_ratio`,
    `logprob_drift` (mean |log π − log π_behaviour|) and `entropy` where J_RL was."""
    rollout_tokens: int = 0
    """Tokens of the rollouts that a pass was spent on; `entropy` is their mean."""

    def figures(self, who: str) -> Metrics:
        """The figures under the name of the parameter set they belong to."""
        return {k if "/" in k else f"{k}/{who}": v for k, v in self.metrics.items()}


class Group(Protocol):
    """The rollouts of one problem, as a method sees them."""

    @property
    def right(self) -> int:
        """Answers judged right."""
        ...

    @property
    def judged(self) -> int:
        """Answers that could be judged."""
        ...

    @property
    def demo(self) -> int | None:
        """The problem's demonstration, for `Imitation.demos`; there if the method is `paired`."""
        ...


@dataclass(frozen=True)
class Imitation:
    """J_SFT in other terms than a plain weight."""

    weight: float = 1.0
    demos: Sequence[int] | None = None
    """Which demonstrations; None: those of the step."""
    token_weight: Literal["phi"] | None = None
    """`phi`: each token weighs p (1 − p), detached."""


@dataclass(frozen=True)
class Exploration:
    """J_RL in other terms than a plain weight."""

    weight: float = 1.0
    groups: Sequence[Any] | None = None
    """Which of `Objectives.groups`; None: all."""
    advantage: Callable[[float], float] | None = None
    """Advantage of a reward; None: the reward against its group, by `rl.advantage`."""
    scale: Literal["group_std", "group", "batch_std"] | None = None
    """In place of `rl.advantage`."""
    gamma: float | None = None
    """Each group's demonstration takes part with reward 1, its tokens weighed π / (π + γ)."""


class Objectives(Protocol):
    """One update's data: a batch of demonstrations and groups of rollouts from the policy."""

    @property
    def groups(self) -> Sequence[Group]:
        """The rollouts of the update, by problem."""
        ...

    def gradient(
        self, theta: str, *, sft: float | Imitation = 0.0, rl: float | Exploration = 0.0
    ) -> Gradient:
        """∇ [ sft · J_SFT(θ,w) + rl · J_RL(θ,w) ] with θ the named set (`student` or `shadow`), at
        the parameters as they are. An objective of weight 0 is not computed at all.

        Raises NonFinite where it is NaN or infinite; the update is then skipped.
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

    def toward(self, other: Any, share: float) -> None:
        """Moves to (1 − share) · itself + share · other; at 1 to the last bit."""
        ...


OptionsT = TypeVar("OptionsT", bound=Options)


class Method(ABC, Generic[OptionsT]):
    """One way of combining SFT and RL. `options` says which adapters it trains, and from what."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def begin(self, sets: Mapping[str, Movable], step: int, steps: int) -> None:
        """Called once before 0-based step `step` of `steps`, which may be several updates."""

    @abstractmethod
    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        """Takes an update of 0-based step `step` of `steps`; returns its figures."""

    def state(self) -> dict[str, Any]:
        """What the method itself remembers from step to step, JSON-able; for most, nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what `state()` gave."""
