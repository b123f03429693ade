"""CHORD: SFT inside RL, under a weight that fades, and a weight for each token (arXiv 2508.11408).

    θ ← θ + α ∇ [ (1−μ) J_RL(θ) + μ Σ_t φ_t log π(y_t) / Σ_t 1 ]

CHORD-μ (the default): μ falls by a cosine from 0.9 to 0.05 in 200 steps, φ = 1. CHORD-φ
(`{mu: 0.1, phi: true}`): μ is constant and φ_t = p (1 − p), detached, so that neither what the
policy knows already nor what is wholly strange to it dominates.

Deviations: J_SFT is the token mean over the whole step; the weight with the schedule is by step and
not by gradient update (they differ with `rl.mini_batches` or `rl.inner_epochs` over 1).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from bridge_engine.methods.base import Imitation, Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options
from bridge_engine.metrics import Metrics
from bridge_engine.spec.base import SpecModel


class MuSchedule(SpecModel):
    """CHORD's μ: up in a straight line, then down to its valley by a cosine."""

    peak: Annotated[float, Field(ge=0, le=1)] = 0.9
    """μ at the end of the warmup: the weight of SFT."""
    valley: Annotated[float, Field(ge=0, le=1)] = 0.05
    """μ after the decay, and from then on."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps from 0 to the peak."""
    decay_steps: Annotated[int, Field(ge=1)] = 200
    """Steps from the peak to the valley."""

    def at(self, step: int) -> float:
        """μ of 0-based `step`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        fraction = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        return self.valley + (self.peak - self.valley) * (1 + math.cos(math.pi * fraction)) / 2


class ChordOptions(Options):
    """CHORD: SFT as one more objective, weighed by μ and, token by token, by φ."""

    source = "arXiv 2508.11408"
    learns_from = BOTH
    name: Literal["chord"] = "chord"
    mu: Annotated[
        Annotated[float, Field(ge=0, le=1), Tag("constant")]
        | Annotated[MuSchedule, Tag("schedule")],
        Discriminator(lambda v: "schedule" if isinstance(v, dict | MuSchedule) else "constant"),
    ] = MuSchedule()
    """Weight of SFT against RL: a constant, or {peak, valley, warmup_steps, decay_steps}."""
    phi: bool = False
    """Weigh each demonstration token with p (1 − p). CHORD-φ is {mu: 0.1, phi: true}."""

    def mu_at(self, step: int) -> float:
        """μ of 0-based `step`."""
        return self.mu.at(step) if isinstance(self.mu, MuSchedule) else self.mu


class Chord(Method[ChordOptions]):
    """Imitation that fades."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        mu = self.options.mu_at(step)
        imitation = Imitation(mu, token_weight="phi" if self.options.phi else None)
        gradient = objectives.gradient("student", sft=imitation, rl=1 - mu)
        norm = sets["student"].ascend(gradient.theta)
        return {"mu": mu, **gradient.figures("student"), "grad_norm/student": norm}
