"""BRIDGE: SFT leads, RL follows (arXiv 2509.06948, §3 of which is this page).

    bilevel:   max_w J_SFT(w, θ*(w))   s.t.   θ*(w) = argmax_θ J_RL(θ, w)
    relaxed:   max_{θ,w} (1−λ) J_SFT(θ,w) + λ [ J_RL(θ,w) − max_θ̂ J_RL(θ̂,w) ]

One step, all gradients at the parameters before it, all on the same demonstrations and rollouts:

    student  θ ← θ + α [ (1−λ) ∇_θ J_SFT(θ,w) + λ ∇_θ J_RL(θ,w) ]
    shadow   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)
    teacher  w ← w + β ∇_w { (1−λ) J_SFT(θ,w) + λ [ J_RL(θ,w) − J_RL(θ̂,w) ] }

What the paper reports with it (Qwen2.5-3B, average of five benchmarks): 36.0 against 32.2 for both
RL and cold start, at 1.13 times the time and 1.14 times the memory of an RL run.

Cost: one pass through (θ,w) gives the gradients of both; only the shadow's pass is extra.

Deviations, and what the paper leaves open:
- θ is a LoRA adapter too (`student: lora`), where the paper trains the base weights; the shadow
  then costs megabytes, and the result is one exact adapter of twice the rank.
- α, β, rank and batch sizes are not published; ours are in `bridge_engine.spec`.
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

from collections.abc import Mapping

from bridge_engine.method_options import BridgeOptions
from bridge_engine.methods.base import Method, Movable, Objectives
from bridge_engine.objectives import Metrics


class Bridge(Method[BridgeOptions]):
    """Cooperative SFT and RL."""

    def step(
        self, objectives: Objectives, sets: Mapping[str, Movable], step: int, steps: int
    ) -> Metrics:
        lam = self.options.lambda_at(step, steps)
        joint = objectives.gradient("student", sft=1 - lam, rl=lam)
        assert joint.w is not None
        metrics = {"lambda": lam, **joint.figures("student")}
        toward_teacher = joint.w

        if self.options.meta:
            alone = objectives.gradient("shadow", rl=1.0)
            assert alone.w is not None
            toward_teacher = joint.w - lam * alone.w
            metrics |= alone.figures("shadow")
            metrics["grad_norm/shadow"] = sets["shadow"].ascend(alone.theta)
            if "objective" in joint.metrics:  # absent while λ is 0: J_RL(θ,w) is not computed
                metrics["gain"] = joint.metrics["objective"] - alone.metrics["objective"]

        metrics["grad_norm/student"] = sets["student"].ascend(joint.theta)
        metrics["grad_norm/teacher"] = sets["teacher"].ascend(toward_teacher)
        return metrics
