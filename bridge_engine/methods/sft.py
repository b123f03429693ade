"""SFT: imitation of the demonstrations, the first half of the usual two stages (paper §1)."""

from collections.abc import Mapping

from bridge_engine.method_options import SftOptions
from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.objectives import Metrics


class Sft(Method[SftOptions]):
    """θ ← θ + α ∇ J_SFT(θ), with J_SFT the mean log-likelihood of a demonstration token."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        gradient = objectives.gradient("student", sft=1.0)
        norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
