"""Cold start: SFT, then RL, the usual two stages (paper §1 and §4, "cold start").

    steps 1 … s      θ ← θ + α_sft ∇ J_SFT(θ)
    steps s+1 … n    θ ← θ + α ∇ J_RL(θ)

The budget is split by `sft_fraction` (s = sft_fraction · n), and the second stage starts with a
fresh optimiser and warmup, as two separate trainings would. With a correctly normalised SFT this is
a strong baseline (arXiv 2604.23747), so give it the steps and rates it deserves before beating it.

Deviation: the KL term of the second stage, where `rl.kl_coef` asks for one, is to the base model
and not to the end of the first stage.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options, Turns
from bridge_engine.metrics import Metrics


class ColdStartOptions(Options):
    """SFT, then RL: the usual two stages."""

    learns_from = BOTH
    source = "the usual two stages; arXiv 2509.06948 §4"
    name: Literal["cold_start"] = "cold_start"
    sft_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps that is SFT; RL gets the rest."""
    sft_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the first stage; default: optimizer.student_lr."""

    def sft_steps(self, steps: int) -> int:
        """Steps of the first stage: at least one, and at least one is left to RL."""
        return max(1, min(steps - 1, round(self.sft_fraction * steps)))

    def turns(self, step: int, steps: int) -> Turns:
        first = self.sft_steps(steps)
        return Turns(step, None) if step < first else Turns(None, step - first)

    def totals(self, steps: int) -> tuple[int, int]:
        first = self.sft_steps(steps)
        return first, steps - first


class ColdStart(Method[ColdStartOptions]):
    """SFT on the first steps, RL on the rest."""

    def begin(self, sets: Mapping[str, Movable], step: int, steps: int) -> None:
        if step == self.options.sft_steps(steps):
            sets["student"].restart()

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        if step < self.options.sft_steps(steps):
            gradient = objectives.gradient("student", sft=1.0)
            norm = sets["student"].ascend(gradient.theta, self.options.sft_lr)
        else:
            gradient = objectives.gradient("student", rl=1.0)
            norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
