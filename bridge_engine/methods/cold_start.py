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

from bridge_engine.method_options import ColdStartOptions
from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.objectives import Metrics


class ColdStart(Method[ColdStartOptions]):
    """SFT on the first steps, RL on the rest."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        student = sets["student"]
        first = self.options.sft_steps(steps)
        if step < first:
            gradient = objectives.gradient("student", sft=1.0)
            norm = student.ascend(gradient.theta, self.options.sft_lr)
        else:
            if step == first:
                student.restart()
            gradient = objectives.gradient("student", rl=1.0)
            norm = student.ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
