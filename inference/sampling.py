"""How each row of a batch draws its next token: every row by its own settings and its own numbers.

A draw is the inverse of the row's cumulated distribution at one uniform number, which depends on
the request's seed, the choice and the position alone. So a request with a seed gets the same text
whoever shares its batch, as far as the logits are the same: a batch of another size may round them
differently in their last digits, and a draw that falls within that rounding may fall otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge_engine.rollout.native import inverse, nucleus


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `seed` None draws a new one."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """Log-probabilities of the chosen tokens, and of this many of the likeliest (0 … 20)."""
    echo: bool = False
    """Log-probabilities of the prompt's tokens too."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token and how likely it was, before temperature and top_p; natural logarithms."""

    id: int
    logprob: float | None
    """None of a prompt's first token."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, the likeliest first."""


def uniforms(seed: int, choice: int) -> random.Random:
    """The numbers of one choice of a request, one a position."""
    return random.Random(f"{seed}/{choice}")


def draw(
    logits_RV: Tensor, params: Sequence[SamplingParams], uniforms_R: Sequence[float]
) -> tuple[list[int], Tensor]:
    """(one token a row, the log-probabilities of all tokens: R × V).

    The latter are computed only where some row asked for them; else they are empty.
    """
    logits_RV = logits_RV.float()
    tokens_R = logits_RV.argmax(-1)
    sampled = [row for row, p in enumerate(params) if p.temperature > 0]
    if sampled:
        tokens_R = tokens_R.clone()
        tokens_R[sampled] = _sampled(logits_RV[sampled], params, uniforms_R, sampled)
    wanted = any(p.logprobs is not None for p in params)
    logprobs_RV = torch.log_softmax(logits_RV, -1) if wanted else logits_RV.new_empty(0)
    return tokens_R.tolist(), logprobs_RV


def _sampled(
    logits_SV: Tensor,
    params: Sequence[SamplingParams],
    uniforms_R: Sequence[float],
    rows: list[int],
) -> Tensor:
    """The tokens of the rows that sample."""
    device = logits_SV.device
    temperatures = [params[row].temperature for row in rows]
    if any(t != 1 for t in temperatures):
        logits_SV = logits_SV / torch.tensor(temperatures, device=device)[:, None]
    weights_SV = torch.softmax(logits_SV, -1)
    narrow = [place for place, row in enumerate(rows) if params[row].top_p < 1]
    if narrow:
        top_p = torch.tensor([params[rows[place]].top_p for place in narrow], device=device)
        weights_SV[narrow] = nucleus(weights_SV[narrow], top_p[:, None])
    uniforms_S1 = torch.tensor([[uniforms_R[row]] for row in rows], device=device)
    return inverse(weights_SV, uniforms_S1).squeeze(1)


def token_info(token: int, logprobs_V: Tensor, top: int) -> TokenInfo:
    """What is told of a chosen token."""
    if not top:
        return TokenInfo(token, float(logprobs_V[token]))
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenInfo(token, float(logprobs_V[token]), pairs)
