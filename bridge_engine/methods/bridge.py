"""BRIDGE: SFT leads, RL follows (arXiv 2509.06948, §3 of which is this page).

    bilevel:   max_w J_SFT(w, θ*(w))   s.t.   θ*(w) = argmax_θ J_RL(θ, w)
    relaxed:   max_{θ,w} (1−λ) J_SFT(θ,w) + λ [ J_RL(θ,w) − max_θ̂ J_RL(θ̂,w) ]

One step, all gradients at the parameters before it and all on the same demonstrations and rollouts:

    student  θ ← θ + α [ (1−λ) ∇_θ J_SFT(θ,w) + λ ∇_θ J_RL(θ,w) ]
    shadow   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)
    teacher  w ← w + β ∇_w { (1−λ) J_SFT(θ,w) + λ [ J_RL(θ,w) − J_RL(θ̂,w) ] }

What the paper reports with it (Qwen2.5-3B, average of five benchmarks): 36.0 against 32.2 for both
RL and cold start, at 1.13 times the time and 1.14 times the memory of an RL run.

Cost: one pass through (θ,w) gives the gradients of both; only the shadow's pass is extra.

Deviations, and what the paper leaves open:
- θ is a LoRA adapter too by default, where the paper trains the base weights (`student: full`); the
  shadow then costs megabytes, and the result is one exact adapter of twice the rank.
- Student and shadow are moved at once (`order: simultaneous`), as the equations are written; the
  shadow is never made equal to the student again unless `resync_every` or `shadow_ema` asks for it
  (where θ̂ = θ the gain's two gradients cancel, and the teacher sees SFT alone).
- α, β, rank and batch sizes are not published; ours are in `bridge_engine.spec.train`.
- λ is a constant 0.5 by default; the first version of the paper moves it from 0 to 1
  (`lambda: {start: 0, end: 1}`), the later one finds 0.3…0.7 alike.
- J_SFT is the mean over demonstration tokens, where the paper writes the log-likelihood of whole
  solutions; J_RL is GRPO with the token mean over the step. This is what λ weighs.
- Each parameter set has an AdamW and a clipping of its own, so the shadow takes steps as long as
  the student's although its gradient lacks the factor λ.
- J_RL has no KL term unless `rl.kl_coef` is set; for the shadow that term is then estimated on the
  policy's rollouts without importance weights.
- The cooperative gain is the difference of the two surrogates on the shared rollouts. It also grows
  when the shadow merely drifts off the rollouts' distribution, so its clip ratio and drift are
  reported beside it: read them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from bridge_engine.methods.base import Gradient, Method, Movable, Objectives
from bridge_engine.methods.options import Weighted
from bridge_engine.metrics import Metrics

if TYPE_CHECKING:
    from bridge_engine.vector import Vector


class BridgeOptions(Weighted):
    """BRIDGE: SFT leads, RL follows, joined by the cooperative gain (arXiv 2509.06948)."""

    source = "arXiv 2509.06948 §3"
    name: Literal["bridge"] = "bridge"
    meta: bool = True
    """False drops the cooperative gain from the teacher's objective (the paper's ablation)."""
    teacher_sees: Literal["both", "sft"] = "both"
    """`sft` leaves the teacher nothing but (1−λ) J_SFT: an ablation, which needs no shadow."""
    order: Literal["simultaneous", "sequential"] = "simultaneous"
    """`simultaneous`: all three gradients at the parameters before the step. `sequential`: student
    and shadow move first, and the teacher's gradient is taken where they then are, for a second
    pass through each."""
    resync_every: Annotated[int, Field(ge=1)] | None = None
    """Make the shadow a copy of the student again every so many steps; null: never."""
    shadow_ema: Annotated[float, Field(gt=0, le=1)] | None = None
    """Pull the shadow toward the student by this share after every step; null: not at all."""

    @model_validator(mode="after")
    def _has_what_it_sets(self) -> Self:
        knobs = [k for k in ("resync_every", "shadow_ema") if getattr(self, k) is not None]
        if knobs and not self.has_shadow:
            raise PydanticCustomError(
                "impossible_combination",
                "{message}",
                {
                    "message": f"{knobs[0]} moves the shadow, and with meta: false or "
                    "teacher_sees: sft there is none",
                    "param": f"method.{knobs[0]}",
                },
            )
        return self

    @property
    def has_shadow(self) -> bool:
        """Does the teacher's objective compare with a policy that sees RL alone?"""
        return self.meta and self.teacher_sees == "both"

    @property
    def policy(self) -> tuple[str, ...]:
        return ("student", "teacher")

    @property
    def adapters(self) -> tuple[str, ...]:
        return (*self.policy, "shadow") if self.has_shadow else self.policy


class Bridge(Method[BridgeOptions]):
    """Cooperative SFT and RL."""

    def begin(self, sets: Mapping[str, Movable], step: int, steps: int) -> None:
        every = self.options.resync_every
        if every and step and step % every == 0:
            sets["shadow"].toward(sets["student"], 1.0)

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        lam = self.options.lambda_at(step, steps)
        joint, teacher = self._joint(objectives, lam)
        metrics = {"lambda": lam, **joint.figures("student")}
        alone = self._alone(objectives)
        if alone is not None:
            metrics |= alone.figures("shadow")
            if "objective" in joint.metrics:  # absent while λ is 0: J_RL(θ,w) is not computed
                metrics["gain"] = joint.metrics["objective"] - alone.metrics["objective"]

        metrics["grad_norm/student"] = sets["student"].ascend(joint.theta)
        if alone is not None:
            metrics["grad_norm/shadow"] = sets["shadow"].ascend(alone.theta)
        if self.options.order == "sequential":
            _, teacher = self._joint(objectives, lam)
            alone = self._alone(objectives)
        if alone is not None:
            assert alone.w is not None
            teacher = teacher - lam * alone.w
        metrics["grad_norm/teacher"] = sets["teacher"].ascend(teacher)

        if self.options.shadow_ema is not None:
            sets["shadow"].toward(sets["student"], self.options.shadow_ema)
        return metrics

    def _joint(self, objectives: Objectives, lam: float) -> tuple[Gradient, Vector]:
        """∇ [ (1−λ) J_SFT(θ,w) + λ J_RL(θ,w) ], and what of it the teacher sees."""
        if self.options.teacher_sees == "both":
            joint = objectives.gradient("student", sft=1 - lam, rl=lam)
            assert joint.w is not None
            return joint, joint.w
        imitate = objectives.gradient("student", sft=1 - lam)
        explore = objectives.gradient("student", rl=lam)
        assert imitate.w is not None
        figures = imitate.metrics | explore.metrics
        return Gradient(imitate.theta + explore.theta, None, figures), imitate.w

    def _alone(self, objectives: Objectives) -> Gradient | None:
        """∇ J_RL(θ̂,w), where there is a shadow."""
        return objectives.gradient("shadow", rl=1.0) if self.options.has_shadow else None
