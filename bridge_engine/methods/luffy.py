"""LUFFY: the expert's solution as one of the group (Yan et al. 2025, arXiv 2504.14945).

    G − 1 rollouts and the demonstration, which counts as right, are one group; A = r − mean(r)

    θ ← θ + α ∇ 1/Z [ Σ_rollouts Σ_t min(r_t A, clip(r_t) A) + Σ_expert Σ_t f(π_t) A ]
    f(π) = π / (π + γ), γ = 0.1, not clipped

So a problem that no rollout solves still has a direction: the expert's advantage is positive. f
lifts the gradient of tokens that the policy finds unlikely.

Deviations: Z is that of `rl.loss` (the token count of the whole step by default). The group's mean
is never divided by its std, as in the source, whatever `rl.advantage` says. A group needs its own
demonstration: `data.prompts` must be problems of `data.demos`.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.methods.base import Exploration, Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options
from bridge_engine.metrics import Metrics


class LuffyOptions(Options):
    """LUFFY: the expert's solution is one of the group, with a shaped policy weight."""

    source = "arXiv 2504.14945"
    learns_from = BOTH
    paired = True
    experts = 1
    name: Literal["luffy"] = "luffy"
    gamma: Annotated[float, Field(gt=0)] = 0.1
    """γ of f(π) = π / (π + γ), the expert tokens' weight."""


class Luffy(Method[LuffyOptions]):
    """An expert in the group."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        guided = Exploration(scale="group", gamma=self.options.gamma)
        gradient = objectives.gradient("student", rl=guided)
        norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
