"""Alternating: SFT steps and RL steps in turn on the same parameters (paper §4, "Naive Alter.").

    θ ← θ + α ∇ J_SFT(θ)   `sft_steps` times, then   θ ← θ + α ∇ J_RL(θ)   `rl_steps` times, again

One optimiser serves both, so its moments carry from one objective into the other. The ratio of the
two kinds of step is not published; ours is 1 to 1.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options, Turns
from bridge_engine.metrics import Metrics


class AlternatingOptions(Options):
    """SFT steps and RL steps in turn on the same parameters ("Naive Alter." in the paper)."""

    learns_from = BOTH
    source = '"Naive Alter." of arXiv 2509.06948 §4'
    name: Literal["alternating"] = "alternating"
    sft_steps: Annotated[int, Field(ge=1)] = 1
    """SFT steps in a row, ..."""
    rl_steps: Annotated[int, Field(ge=1)] = 1
    """... and then so many RL steps."""

    def turns(self, step: int, steps: int) -> Turns:
        cycle, place = divmod(step, self.sft_steps + self.rl_steps)
        if place < self.sft_steps:
            return Turns(cycle * self.sft_steps + place, None)
        return Turns(None, cycle * self.rl_steps + place - self.sft_steps)

    def totals(self, steps: int) -> tuple[int, int]:
        cycles, rest = divmod(steps, self.sft_steps + self.rl_steps)
        imitating = cycles * self.sft_steps + min(rest, self.sft_steps)
        return imitating, steps - imitating


class Alternating(Method[AlternatingOptions]):
    """SFT and RL in turn."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        imitates = self.options.turns(step, steps).demos is not None
        weights = {"sft": 1.0} if imitates else {"rl": 1.0}
        gradient = objectives.gradient("student", **weights)
        norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
