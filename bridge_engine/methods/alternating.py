"""Alternating: SFT steps and RL steps in turn on the same parameters (paper §4, "Naive Alter.").

    θ ← θ + α ∇ J_SFT(θ)   `sft_steps` times, then   θ ← θ + α ∇ J_RL(θ)   `rl_steps` times, again

One optimiser serves both, so its moments carry from one objective into the other. The ratio of the
two kinds of step is not published; ours is 1 to 1.
"""

from collections.abc import Mapping

from bridge_engine.method_options import AlternatingOptions
from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.objectives import Metrics


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
