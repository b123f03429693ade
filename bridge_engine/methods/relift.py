"""ReLIFT: RL, interleaved with SFT on the hardest problems (arXiv 2506.07527).

    θ ← θ + α ∇ J_RL(θ)                            every step
    problems whose whole group failed are set aside, with their demonstrations
    θ ← θ + α' ∇ J_SFT(θ; those set aside)         when `buffer` of them are there, which empties it

The two kinds of update have an optimiser each. The buffer is part of a checkpoint.

Deviations: a problem is in the buffer once, however often it fails; the demonstrations are the data
set's, where the source has a stronger model write them when they are needed. `data.prompts` must be
problems of `data.demos`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from bridge_engine.methods.base import Imitation, Method, Movable, Objectives
from bridge_engine.methods.options import BOTH, Options
from bridge_engine.metrics import Metrics


class ReliftOptions(Options):
    """ReLIFT: RL, with SFT now and then on the problems that RL could not solve."""

    source = "arXiv 2506.07527"
    learns_from = BOTH
    paired = True
    name: Literal["relift"] = "relift"
    buffer: Annotated[int, Field(ge=1)] = 128
    """Unsolved problems that are collected before their demonstrations make one SFT step."""
    sft_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of those steps; default: optimizer.student_lr."""

    @property
    def optimizers(self) -> dict[str, str]:
        return {"imitation": "student"}


class Relift(Method[ReliftOptions]):
    """RL, and lessons on what it cannot do."""

    def __init__(self, options: ReliftOptions) -> None:
        super().__init__(options)
        self.buffer: list[int] = []

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        gradient = objectives.gradient("student", rl=1.0)
        metrics = gradient.figures("student")
        metrics["grad_norm/student"] = sets["student"].ascend(gradient.theta)
        for group in objectives.groups:
            failed = group.judged and not group.right
            if failed and group.demo is not None and group.demo not in self.buffer:
                self.buffer.append(group.demo)
        if len(self.buffer) >= self.options.buffer:
            lesson = objectives.gradient("student", sft=Imitation(demos=self.buffer))
            metrics |= lesson.figures("student")
            rate = self.options.sft_lr
            metrics["grad_norm/imitation"] = sets["imitation"].ascend(lesson.theta, rate)
            self.buffer = []
        return {**metrics, "buffer": float(len(self.buffer))}

    def state(self) -> dict[str, Any]:
        return {"buffer": self.buffer}

    def load(self, state: dict[str, Any]) -> None:
        self.buffer = list(state.get("buffer", []))
