"""The objectives, as pure functions of log-probabilities. Each returns (loss, metrics).

Shapes: B sequences, T completion tokens (right-padded). `mask_BT` is 1 on real completion tokens.
`total_tokens` is the token count of the *whole optimisation step*, not of this micro-batch: summing
the losses of any split into micro-batches gives one and the same update. (Normalising by each
micro-batch's own count is the published trap that made "SFT, then RL" look bad.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Metrics = dict[str, float]

STD_EPSILON = 1e-4
"""TRL's constant in the advantage's denominator."""


def sft(logprobs_BT: Tensor, mask_BT: Tensor, *, total_tokens: int) -> tuple[Tensor, Metrics]:
    """−J_SFT: negative log-likelihood per demonstration token (paper §2, J_SFT)."""
    loss = -(logprobs_BT * mask_BT).sum() / total_tokens
    return loss, {"sft/nll": loss.item()}


def grpo(
    logprobs_BT: Tensor,
    behaviour_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    total_tokens: int,
) -> tuple[Tensor, Metrics]:
    """−J_RL: GRPO's clipped surrogate, mean over the tokens of the whole step (TRL's `dapo` norm).

    The ratio is π / π_behaviour, with the log-probabilities of whatever sampled the rollouts: for
    the shadow that is π_{θ̂,w} / π_{θ,w}, never the shadow against itself.
    """
    ratio_BT = torch.exp(logprobs_BT - behaviour_BT)
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantages_B1 = advantages_B.unsqueeze(1)
    objective_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    loss = -(objective_BT * mask_BT).sum() / total_tokens
    with torch.no_grad():
        # what counts is clipping that bites: where the gradient of the token is zero
        low = (ratio_BT < 1 - clip_low) & (advantages_B1 < 0)
        high = (ratio_BT > 1 + clip_high) & (advantages_B1 > 0)
        clipped = ((low | high) * mask_BT).sum() / total_tokens
        mismatch = ((logprobs_BT - behaviour_BT).abs() * mask_BT).sum() / total_tokens
    return loss, {
        "objective": -loss.item(),
        "clip_ratio": clipped.item(),
        "logprob_drift": mismatch.item(),
    }


def kl(
    logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, *, total_tokens: int
) -> tuple[Tensor, Metrics]:
    """KL(π ‖ π_ref) by the k3 estimator, exp(d) − d − 1 with d = log π_ref − log π, token mean."""
    difference_BT = reference_BT - logprobs_BT
    loss = ((difference_BT.exp() - difference_BT - 1) * mask_BT).sum() / total_tokens
    return loss, {"kl": loss.item()}


def group_advantages(
    rewards: Sequence[float | None], group_size: int, *, divide_by_std: bool
) -> list[float | None]:
    """Each reward against its group: (r − mean) / (std + 1e-4), or r − mean.

    `rewards` holds whole groups one after another. None marks an answer that could not be judged:
    it takes no part in its group's mean and gets no advantage, rather than count as wrong. A group
    with fewer than two judged answers compares nothing and gets 0. std has n − 1 in its
    denominator, as in TRL.
    """
    advantages: list[float | None] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        judged = torch.tensor([r for r in group if r is not None], dtype=torch.float64)
        if len(judged) < 2 or bool((judged == judged[0]).all()):
            advantages += [None if r is None else 0.0 for r in group]
            continue
        mean = judged.mean().item()
        scale = judged.std().item() + STD_EPSILON if divide_by_std else 1.0
        advantages += [None if r is None else (r - mean) / scale for r in group]
    return advantages
