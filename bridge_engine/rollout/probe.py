"""Does a server sample from the policy? One fixed sequence tells.

Trainers have trained for months against a server that kept its first weights, so the engine asks
after each sync: the server's log-probabilities of the probe must be the trainer's own, and nearer
to them than to those of any weights the server could have kept (the base's, the last sync's).

Two ways to go wrong, two readings. `scored`: the whole probe's log-probabilities, which the server
computes afresh. `drawn`: those of tokens it writes after the probe, which is how it samples, with
the keys and values of the prompt taken from its prefix cache; a cache left over from old weights
shows in these alone, and only in a prompt longer than a block of it (128 tokens on CPU, 16 on GPU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge_engine.forward.sequences import TokenSequence, pad
from bridge_engine.policy import Policy
from bridge_engine.seeding import generator

PROMPT_TOKENS = 160
"""Length of the probe: more than the largest usual block of a prefix cache."""
DRAWN_TOKENS = 8
"""Tokens that the server writes after it."""


@dataclass(frozen=True)
class Tolerance:
    """How near is equal, in nats a token."""

    mean: float
    """Largest mean |Δ log p|."""
    apart: float
    """Root mean square from which on two sets of weights can be told apart by the probe."""


EXACT = Tolerance(mean=1e-3, apart=1e-4)
"""Trainer and server in float32 (measured: 3e-6 mean, 5e-5 at most)."""
ROUNDED = Tolerance(mean=0.15, apart=0.15)
"""Anything in bfloat16 (measured: 3e-2 mean)."""


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """By the dtype the trainer computes in, which must be the server's."""
    return EXACT if dtype in (torch.float32, torch.float64) else ROUNDED


def probe_prompt(vocabulary: int, context: int) -> list[int]:
    """The same tokens for every run, as many as the context leaves room for."""
    length = max(2, min(PROMPT_TOKENS, context - DRAWN_TOKENS - 1))
    return torch.randint(vocabulary, (length,), generator=generator(0, "vllm-probe")).tolist()


@torch.no_grad()
def trainer_logprobs(policy: Policy, names: Sequence[str], tokens: Sequence[int]) -> Tensor:
    """logprobs_L of each token but the first, by the trainer's own forward pass under these sets
    (none: the base), float32 on the CPU."""
    whole = TokenSequence(list(tokens[:1]), list(tokens[1:]))
    with policy.using(*names):
        logprobs_1L, _ = policy.logprobs(pad([whole], pad_id=policy.pad_id, device=policy.device))
    return logprobs_1L[0].float().cpu()


def mean_distance(one_L: Tensor, other_L: Tensor) -> float:
    """Mean |Δ|, infinite where either is not a number."""
    return float((one_L - other_L).abs().nan_to_num(nan=torch.inf).mean())


def mismatch(
    scored_L: Tensor,
    drawn_K: Tensor,
    ours_L: Tensor,
    others: Mapping[str, Tensor],
    tolerance: Tolerance,
) -> str | None:
    """What is wrong with a server's readings, or None.

    scored_L, ours_L: the server's and the trainer's log-probabilities of the probe and the tokens
    drawn after it; drawn_K: of the latter as they were drawn; others: whose weights the server
    could have kept, and the trainer's log-probabilities of the probe's first tokens under them.
    """
    distance = mean_distance(scored_L, ours_L)
    kept = _nearer_ones(scored_L, ours_L, others, tolerance)
    if kept:
        return (
            f"its log-probabilities are nearer to those of {min(kept, key=kept.__getitem__)} than "
            f"to the policy's ({distance:.2g} nats a token away): it did not take up the new "
            "weights"
        )
    if not distance <= tolerance.mean:
        return (
            f"its log-probabilities are {distance:.2g} nats a token away from the trainer's "
            f"({tolerance.mean:g} are allowed)"
        )
    cached = mean_distance(drawn_K, scored_L[-len(drawn_K) :])
    if not cached <= tolerance.mean:
        return (
            f"what it draws is {cached:.2g} nats a token away from what it scores: its prefix "
            "cache is that of older weights"
        )
    return None


def _nearer_ones(
    scored_L: Tensor, ours_L: Tensor, others: Mapping[str, Tensor], tolerance: Tolerance
) -> dict[str, float]:
    """Those of the others that the server is nearer to than to the policy, and how near; weights
    that the probe cannot tell from the policy's are none of them."""
    found: dict[str, float] = {}
    for whose, other_P in others.items():
        ours_P, scored_P = ours_L[: len(other_P)], scored_L[: len(other_P)]
        away = _rms(scored_P - other_P)
        if _rms(ours_P - other_P) > tolerance.apart and away < _rms(scored_P - ours_P):
            found[whose] = away
    return found


def _rms(difference_L: Tensor) -> float:
    return float(difference_L.double().square().mean().sqrt())
