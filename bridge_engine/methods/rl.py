"""RL: GRPO from the base model, with no demonstrations ("RL-zero", paper §4).

    θ ← θ + α ∇ J_RL(θ),   J_RL = 1/Z Σ_rollouts Σ_t min(r_t A, clip(r_t) A),   r_t = π / π_sampler

J_RL is GRPO's clipped surrogate (Shao et al. 2024, arXiv 2402.03300), A the reward against its
group; `bridge_engine.objectives.rl` has its variants.

Deviations: Z is the token count of the whole step (`rl.loss: grpo` has the paper's mean of means),
one optimisation step a batch, and no KL unless `rl.kl_coef` asks for it; constants are TRL's. With
one inner step the policy that samples is the policy that learns, so in float32 the ratio is 1 and
clipping never bites; in bfloat16 it differs by the rounding of merged weights.
"""

from collections.abc import Mapping
from typing import Literal

from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.methods.options import Options
from bridge_engine.metrics import Metrics


class RlOptions(Options):
    """GRPO from the base model ("RL-zero" in the paper): no demonstrations."""

    learns_from = frozenset({"rewards"})
    source = "GRPO: Shao et al. 2024, arXiv 2402.03300"
    name: Literal["rl"] = "rl"


class Rl(Method[RlOptions]):
    """θ ← θ + α ∇ J_RL(θ)."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        gradient = objectives.gradient("student", rl=1.0)
        norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
