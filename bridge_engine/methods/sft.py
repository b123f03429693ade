"""SFT: imitation of the demonstrations, the first half of the usual two stages (paper §1).

    θ ← θ + α ∇ J_SFT(θ),   J_SFT = Σ_demos Σ_t log π(y_t) / Σ_demos Σ_t 1

Deviation: J_SFT is the mean over the demonstration tokens of the whole step, where the paper writes
the log-likelihood of whole solutions. Prompts are not imitated.
"""

from collections.abc import Mapping
from typing import Literal

from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.methods.options import Options
from bridge_engine.metrics import Metrics


class SftOptions(Options):
    """Supervised fine-tuning on the demonstrations alone."""

    learns_from = frozenset({"demos"})
    source = "Ouyang et al. 2022, arXiv 2203.02155 §3.5, and before"
    name: Literal["sft"] = "sft"


class Sft(Method[SftOptions]):
    """θ ← θ + α ∇ J_SFT(θ), with J_SFT the mean log-likelihood of a demonstration token."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        gradient = objectives.gradient("student", sft=1.0)
        norm = sets["student"].ascend(gradient.theta)
        return {**gradient.figures("student"), "grad_norm/student": norm}
