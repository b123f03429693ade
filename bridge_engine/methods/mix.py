"""Mix: the two losses summed, on one set of parameters (the paper's later version, §4).

    θ ← θ + α ∇ [ (1−λ) J_SFT(θ) + λ J_RL(θ) ]

BRIDGE without its teacher. Each objective is normalised by its own tokens, so λ means the same as
there; the paper sums the losses with weights it does not publish.
"""

from collections.abc import Mapping
from typing import Literal

from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.methods.options import Weighted
from bridge_engine.metrics import Metrics


class MixOptions(Weighted):
    """SFT and RL losses summed, one set of parameters."""

    source = "arXiv 2509.06948 (later version) §4"
    name: Literal["mix"] = "mix"


class Mix(Method[MixOptions]):
    """SFT and RL at once."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        lam = self.options.lambda_at(step, steps)
        gradient = objectives.gradient("student", sft=1 - lam, rl=lam)
        norm = sets["student"].ascend(gradient.theta)
        return {"lambda": lam, **gradient.figures("student"), "grad_norm/student": norm}
