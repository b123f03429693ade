"""SRFT: SFT and RL in one stage, weighed by entropy (arXiv 2506.19767, as 2509.04419 rebuilt it).

    θ ← θ + α ∇ { ½ e^(−H_demos) J_SFT(θ) + 1/Z [ 0.1 e^H Σ_right log π  −  Σ_wrong log π ] }

H_demos and H are the policy's mean entropy per token on the demonstrations and on the rollouts of
the step, taken as constants: the surer the policy is on an expert's text, the more it imitates it;
the less sure it is on its own, the more a right answer counts.

The weights need no pass of their own: each part's gradient is taken with weight 1, its pass tells
the entropy, and the gradients are added with the weights that follow.

Deviations: Z is that of `rl.loss`, and log π is its surrogate (with one update a batch they have
the same gradient). The first paper's further term, RL on the demonstrations as off-policy rollouts,
is left out, as it is in the rebuilt one.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.methods.base import Exploration, Gradient, Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options
from bridge_engine.metrics import Metrics


class SrftOptions(Options):
    """SRFT: imitation and exploration at once, weighed by the policy's entropy."""

    source = "arXiv 2506.19767, as in 2509.04419"
    learns_from = BOTH
    name: Literal["srft"] = "srft"
    sft_weight: Annotated[float, Field(gt=0)] = 0.5
    """Imitation weighs sft_weight · exp(−H on the demonstrations)."""
    right_weight: Annotated[float, Field(gt=0)] = 0.1
    """A right rollout weighs right_weight · exp(H on the rollouts); a wrong one −1."""


class Srft(Method[SrftOptions]):
    """Imitation and exploration at once."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        imitate = objectives.gradient("student", sft=1.0)
        right = objectives.gradient("student", rl=Exploration(advantage=lambda r: float(r > 0)))
        wrong = objectives.gradient("student", rl=Exploration(advantage=lambda r: -float(r <= 0)))
        entropy = _mean_entropy(right, wrong)
        sft_weight = self.options.sft_weight * math.exp(-imitate.metrics["sft/entropy"])
        right_weight = self.options.right_weight * math.exp(entropy)
        direction = sft_weight * imitate.theta + right_weight * right.theta + wrong.theta
        return {
            **imitate.figures("student"),
            "entropy": entropy,
            "weight/sft": sft_weight,
            "weight/right": right_weight,
            "grad_norm/student": sets["student"].ascend(direction),
        }


def _mean_entropy(*parts: Gradient) -> float:
    """The mean over the tokens of all parts; 0 where there are none."""
    tokens = sum(part.rollout_tokens for part in parts)
    total = sum(part.metrics.get("entropy", 0.0) * part.rollout_tokens for part in parts)
    return total / max(1, tokens)
