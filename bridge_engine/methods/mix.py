"""Mix: the two losses summed, on one set of parameters (the paper's later version, §4).

    θ ← θ + α ∇ [ (1−λ) J_SFT(θ) + λ J_RL(θ) ]

BRIDGE without its teacher. Each objective is normalised by its own tokens, so λ means the same as
there; the paper sums the losses with weights it does not publish.
"""

from collections.abc import Mapping

from bridge_engine.method_options import MixOptions
from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.objectives import Metrics


class Mix(Method[MixOptions]):
    """SFT and RL at once."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        lam = self.options.lambda_at(step, steps)
        gradient = objectives.gradient("student", sft=1 - lam, rl=lam)
        norm = sets["student"].ascend(gradient.theta)
        return {"lambda": lam, **gradient.figures("student"), "grad_norm/student": norm}
