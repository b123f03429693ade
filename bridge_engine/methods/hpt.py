"""HPT: imitate what the policy cannot solve, explore the rest (arXiv 2509.04419).

    for each problem q of the step, with c_q right answers among its G rollouts:
        J_q = J_SFT on its demonstration   if c_q ≤ gate
              J_RL on its group            otherwise
    θ ← θ + α ∇ (1/Q) Σ_q J_q

Deviations: J_SFT and J_RL are token means over all the problems of their kind, each weighed with
its share of the Q problems, so that a long solution counts for no more than a problem. A problem
whose answers could all not be judged is neither. `data.prompts` must be problems of `data.demos`.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bridge_engine.methods.base import Exploration, Imitation, Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options
from bridge_engine.metrics import Metrics


class HptOptions(Options):
    """HPT: problems the policy solves are explored, the others imitated."""

    source = "arXiv 2509.04419"
    learns_from = BOTH
    paired = True
    name: Literal["hpt"] = "hpt"
    gate: Annotated[int, Field(ge=0)] = 0
    """A group with at most this many right answers is imitated (0 and 2 in the source)."""


class Hpt(Method[HptOptions]):
    """A switch for each problem."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        judged = [g for g in objectives.groups if g.judged]
        failed = [g for g in judged if g.right <= self.options.gate]
        solved = [g for g in judged if g.right > self.options.gate]
        demos = [g.demo for g in failed if g.demo is not None]
        share = len(failed) / max(1, len(judged))
        gradient = objectives.gradient(
            "student",
            sft=Imitation(share, demos=demos),
            rl=Exploration(1 - share if solved else 0.0, groups=solved),
        )
        norm = sets["student"].ascend(gradient.theta)
        return {"imitated": share, **gradient.figures("student"), "grad_norm/student": norm}
