"""Truncated importance sampling: what corrects a sampler that is not quite the policy.

A sampler in bfloat16, or a server of its own, draws from π_sampler and reports its log-probability;
the trainer's forward pass of the same weights says π_old. With `rl.importance_correction:
truncated` the ratio of the surrogate is taken to π_old (one more forward pass, without gradient),
and each token weighs min(π_old / π_sampler, cap), as in TRL's importance-sampling correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import whole
from bridge_engine.forward.sequences import TokenSequence, pad
from bridge_engine.groups import RolloutGroup
from bridge_engine.metrics import Metrics
from bridge_engine.objectives import importance_weights
from bridge_engine.policy import Policy
from bridge_engine.spec.train import TrainSpec


@torch.no_grad()
def corrected(
    groups: Sequence[RolloutGroup], policy: Policy, spec: TrainSpec, world: World | None = None
) -> tuple[list[RolloutGroup], Metrics]:
    """The groups with the trainer's log-probabilities as behaviour, and weights on their tokens."""
    rollouts = [s for g in groups for s in g.rollouts]
    with whole(policy, *spec.method.policy):
        scored = (world or World()).spread(rollouts, lambda mine: _scored(mine, policy, spec))
    cap = spec.rl.importance_cap
    drift, total, capped = 0.0, 0, 0
    found: list[TokenSequence] = []
    for rollout, trainer in zip(rollouts, scored, strict=True):
        sampled = rollout.behaviour
        assert sampled is not None, "rollouts carry the sampler's log-probabilities"
        weights = importance_weights(trainer, sampled, cap)
        found.append(replace(rollout, behaviour=trainer, weights=weights))
        drift += sum(abs(a - b) for a, b in zip(trainer, sampled, strict=True))
        capped += sum(w >= cap for w in weights)
        total += len(weights)
    pieces = iter(found)
    corrected_groups = [replace(g, rollouts=[next(pieces) for _ in g.rollouts]) for g in groups]
    return corrected_groups, {
        "sampler_mismatch": drift / max(1, total),
        "importance/capped": capped / max(1, total),
    }


def _scored(
    rollouts: Sequence[TokenSequence], policy: Policy, spec: TrainSpec
) -> list[list[float]]:
    """The trainer's log-probability of each completion token."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i]))
    scored: dict[int, list[float]] = {}
    for start in range(0, len(order), spec.runtime.micro_batch):
        chosen = order[start : start + spec.runtime.micro_batch]
        batch = pad([rollouts[i] for i in chosen], pad_id=policy.pad_id, device=policy.device)
        with policy.using(*spec.method.policy):
            logprobs_BT, _ = policy.logprobs(batch)
        for i, row_T in zip(chosen, logprobs_BT.tolist(), strict=True):
            scored[i] = row_T[: len(rollouts[i].completion)]
    return [scored[i] for i in range(len(rollouts))]
