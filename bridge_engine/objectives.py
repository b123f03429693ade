"""The objectives, as pure functions of log-probabilities. Each returns (loss, metrics).

Shapes: B sequences, T completion tokens (right-padded). `mask_BT` is 1 on real completion tokens.
`StepTotals` counts the *whole optimisation step*, not this micro-batch: summing the losses of any
split into micro-batches gives one and the same update. (Normalising by each micro-batch's own count
is the published trap that made "SFT, then RL" look bad.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge_engine.spec.train import RlSpec

Metrics = dict[str, float]

STD_EPSILON = 1e-4
"""TRL's constant in the advantage's denominator."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What the losses of one optimisation step are divided by."""

    tokens: int
    """Completion tokens that take part."""
    sequences: int
    """Completions, those included whose tokens are masked."""
    longest: int
    """The longest completion there could be: rollout.max_new_tokens."""


def sft(
    logprobs_BT: Tensor, mask_BT: Tensor, *, total_tokens: int, weights_BT: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """−J_SFT: negative log-likelihood per demonstration token (paper §2, J_SFT).

    `weights_BT` weighs the tokens in the loss (CHORD-φ), not in the reported likelihood.
    """
    nll = -(logprobs_BT * mask_BT).sum() / total_tokens
    loss = nll if weights_BT is None else -(weights_BT * logprobs_BT * mask_BT).sum() / total_tokens
    return loss, {"sft/nll": nll.item()}


def phi(logprobs_BT: Tensor) -> Tensor:
    """CHORD's token weight φ = p (1 − p), detached: large where the policy is undecided, 0 where
    it is sure, either way (arXiv 2508.11408)."""
    p_BT = logprobs_BT.detach().exp()
    return p_BT * (1 - p_BT)


def rl(
    logprobs_BT: Tensor,
    behaviour_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    spec: RlSpec,
    totals: StepTotals,
    reference_BT: Tensor | None = None,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """−J_RL: the clipped surrogate of GRPO and its relatives (`RlSpec.loss`), less kl_coef · KL.

    With r = π / π_behaviour per token, A the advantage and c the clip to [1 − clip_low,
    1 + clip_high], a token's objective is

        dapo, grpo, dr_grpo   min(r A, c(r) A)                    (arXiv 2402.03300, eq. 3)
        gspo                  the same, r = exp(mean over the sequence of log r_t)  (2507.18071)
        cispo                 sg[min(r, 1 + clip_high)] · A · log π       (2506.13585, eq. 4)

    and they differ in what the sum is divided by: dapo and cispo by the tokens of the step (2503.
    14476), grpo and gspo by each sequence's tokens and then the sequences, dr_grpo by sequences ·
    longest (2503.20783). cispo has no lower clip, as in its paper's experiments; TRL writes its
    upper bound as `epsilon_high` = 1 + clip_high.

    The ratio is to whatever sampled the rollouts: for the shadow π_{θ̂,w} / π_{θ,w}, never the
    shadow against itself. `reference_BT` (log π_base) is needed where spec.kl_coef > 0;
    `weights_BT` multiplies each token's surrogate, as TRL's importance correction does.
    """
    log_ratio_BT = (logprobs_BT - behaviour_BT) * mask_BT
    if spec.loss == "gspo":
        lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        ratio_BT = (log_ratio_BT.sum(1, keepdim=True) / lengths_B1).exp().expand_as(log_ratio_BT)
    else:
        ratio_BT = log_ratio_BT.exp()
    advantages_B1 = advantages_B.unsqueeze(1)
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    if spec.loss == "cispo":
        objective_BT = ratio_BT.detach().clamp(max=high) * advantages_B1 * logprobs_BT
        clipped_BT = (ratio_BT > high) & (advantages_B1 > 0)
    else:
        objective_BT = torch.minimum(
            ratio_BT * advantages_B1, ratio_BT.clamp(low, high) * advantages_B1
        )
        # what counts is clipping that bites: where the gradient of the token is zero
        clipped_BT = ((ratio_BT < low) & (advantages_B1 < 0)) | (
            (ratio_BT > high) & (advantages_B1 > 0)
        )
    if weights_BT is not None:
        objective_BT = objective_BT * weights_BT
    metrics: Metrics = {}
    if reference_BT is not None:
        divergence_BT = k3(logprobs_BT, reference_BT)
        objective_BT = objective_BT - spec.kl_coef * divergence_BT
        metrics["kl"] = ((divergence_BT * mask_BT).sum() / totals.tokens).item()
    loss = -normalised(objective_BT, mask_BT, spec, totals)
    return loss, metrics | {
        "objective": -loss.item(),
        "clip_ratio": ((clipped_BT * mask_BT).sum() / totals.tokens).item(),
        "logprob_drift": (log_ratio_BT.detach().abs().sum() / totals.tokens).item(),
    }


def normalised(per_token_BT: Tensor, mask_BT: Tensor, spec: RlSpec, totals: StepTotals) -> Tensor:
    """This micro-batch's share of the step's mean, in the way of `RlSpec.loss`; a scalar."""
    kept_BT = per_token_BT * mask_BT
    if spec.loss in ("grpo", "gspo"):
        return (kept_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).sum() / totals.sequences
    if spec.loss == "dr_grpo":
        return kept_BT.sum() / (totals.sequences * totals.longest)
    return kept_BT.sum() / totals.tokens


def shaped(
    logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    spec: RlSpec,
    totals: StepTotals,
) -> tuple[Tensor, Metrics]:
    """−J of an expert's tokens in a group: A · f(π) with f(π) = π / (π + γ), unclipped.

    LUFFY's policy shaping (arXiv 2504.14945, eq. 7): the gradient of a token that the policy finds
    unlikely is larger than with π itself, so that it is learnt at all.
    """
    p_BT = logprobs_BT.exp()
    objective_BT = advantages_B.unsqueeze(1) * p_BT / (p_BT + gamma)
    loss = -normalised(objective_BT, mask_BT, spec, totals)
    return loss, {"objective": -loss.item()}


def k3(logprobs_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """KL(π ‖ π_ref) per token by the k3 estimator: exp(d) − d − 1 with d = log π_ref − log π."""
    difference_BT = reference_BT - logprobs_BT
    return difference_BT.exp() - difference_BT - 1


def importance_weights(
    trainer: Sequence[float], sampler: Sequence[float], cap: float
) -> list[float]:
    """min(π_trainer / π_sampler, cap) for each token: what corrects a sampler that rounds."""
    ratio_T = (torch.tensor(trainer) - torch.tensor(sampler)).exp()
    weights: list[float] = ratio_T.clamp(max=cap).tolist()
    return weights


def group_advantages(
    groups: Sequence[Sequence[float | None]], scale: str = "group_std"
) -> list[list[float | None]]:
    """Each reward against its group, by `RlSpec.advantage`.

    `group_std`: (r − mean) / (std + 1e-4); `group`: r − mean; `batch_std`: r − mean of the group,
    over the std of all rewards. std has n − 1 in its denominator, as in TRL. None marks an answer
    that could not be judged: it takes no part in its group's mean and gets no advantage, rather
    than count as wrong. A group with fewer than two judged answers compares nothing and gets 0.
    """
    everything = torch.tensor([r for g in groups for r in g if r is not None], dtype=torch.float64)
    batch_std = everything.std().item() if len(everything) > 1 else 0.0
    result: list[list[float | None]] = []
    for group in groups:
        judged = torch.tensor([r for r in group if r is not None], dtype=torch.float64)
        if len(judged) < 2 or bool((judged == judged[0]).all()):
            result.append([None if r is None else 0.0 for r in group])
            continue
        mean = judged.mean().item()
        scales = {"group_std": judged.std().item() + STD_EPSILON, "group": 1.0}
        divisor = scales.get(scale, batch_std + STD_EPSILON)
        result.append([None if r is None else (r - mean) / divisor for r in group])
    return result
