"""The in-process sampler: batched, with a KV cache, dropping each row when it ends.

transformers' `generate` keeps finished rows in the batch, and takes another pass over the
vocabulary to say how likely its draws were. Here a row costs nothing after its EOS, and every token
comes with the log-probability it was drawn with, so that training needs no scoring pass: in float32
it equals the training forward pass to 1e-5.

Every draw uses one uniform number fixed by (generator, row, position), not by who else is in the
batch: the same row gets the same randomness however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bridge_engine.logits import head_logits


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw. The defaults sample from the policy itself, as training must."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens whose probability reaches this."""


@dataclass(slots=True)
class Completion:
    """What was drawn after a prompt."""

    tokens: list[int] = field(default_factory=list)
    """Token ids, the EOS included if it was reached."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token under the distribution it was drawn from before temperature
    and top_p (they are the same thing when training)."""
    finished: bool = False
    """False: cut off at max_new_tokens."""


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
    repeats: int = 1,
    batch_size: int = 64,
) -> list[Completion]:
    """Draws `repeats` completions of each prompt; those of one prompt stand together, in order.

    `generator` may be None only at temperature 0. At most `batch_size` sequences are decoded at
    once; a prompt's key-value cache is computed once for all its completions among them.
    """
    total = len(prompts) * repeats
    uniforms_RT = (
        torch.zeros(total, params.max_new_tokens)
        if generator is None
        else torch.rand(total, params.max_new_tokens, generator=generator)
    )
    completions = [Completion() for _ in range(total)]
    # prompts of like length together: less padding; the order of the answers is the caller's
    rows = sorted(range(total), key=lambda row: len(prompts[row // repeats]))
    for start in range(0, total, batch_size):
        chosen = rows[start : start + batch_size]
        distinct = list(dict.fromkeys(row // repeats for row in chosen))
        places = {prompt: place for place, prompt in enumerate(distinct)}
        _decode(
            model,
            [prompts[i] for i in distinct],
            [places[row // repeats] for row in chosen],
            params,
            [completions[row] for row in chosen],
            uniforms_RT[chosen],
            frozenset(eos_ids),
            pad_id,
        )
    return completions


def _decode(
    model: Any,
    prompts: list[Sequence[int]],
    prompt_of_row: list[int],
    params: SamplingParams,
    completions: list[Completion],
    uniforms_RT: Tensor,
    eos_ids: frozenset[int],
    pad_id: int,
) -> None:
    """One batch: a prefill over the distinct prompts, then one token a row at a time."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    mask = mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    hidden_BLD = model.base_model(
        input_ids=tokens.to(device),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    rows_R = torch.tensor(prompt_of_row, device=device)
    hidden_RD, mask = hidden_BLD[rows_R, -1], mask[rows_R]
    if len(prompt_of_row) > len(prompts):
        cache.batch_select_indices(rows_R)
    next_positions_R = mask.sum(1)
    uniforms_RT = uniforms_RT.to(device)
    alive = list(completions)

    for step in range(params.max_new_tokens):
        logprobs_RV = torch.log_softmax(head_logits(model, hidden_RD).float(), dim=-1)
        drawn_R = _draw(logprobs_RV, params, uniforms_RT[:, step])
        drawn_logprobs = logprobs_RV.gather(1, drawn_R.unsqueeze(1)).squeeze(1).tolist()
        keep: list[int] = []
        for row, (token, logprob) in enumerate(zip(drawn_R.tolist(), drawn_logprobs, strict=True)):
            completion = alive[row]
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.finished = token in eos_ids
            if not completion.finished:
                keep.append(row)
        if not keep or step + 1 == params.max_new_tokens:
            return
        if len(keep) < len(alive):
            keep_R = torch.tensor(keep, device=device)
            cache.batch_select_indices(keep_R)
            alive = [alive[row] for row in keep]
            mask, drawn_R = mask[keep_R], drawn_R[keep_R]
            next_positions_R, uniforms_RT = next_positions_R[keep_R], uniforms_RT[keep_R]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden_RD = model.base_model(
            input_ids=drawn_R.unsqueeze(1),
            attention_mask=mask,
            position_ids=next_positions_R.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        next_positions_R = next_positions_R + 1


def _draw(logprobs_RV: Tensor, params: SamplingParams, uniforms_R: Tensor) -> Tensor:
    """One token a row: the inverse of the cumulative distribution at that row's uniform number."""
    if params.temperature == 0:
        return logprobs_RV.argmax(-1)
    probabilities_RV = (
        logprobs_RV.exp()
        if params.temperature == 1
        else torch.softmax(logprobs_RV / params.temperature, dim=-1)
    )
    if params.top_p < 1:
        sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True)
        outside_RV = sorted_RV.cumsum(-1) - sorted_RV >= params.top_p
        probabilities_RV = probabilities_RV.masked_fill(
            outside_RV.gather(1, order_RV.argsort(-1)), 0.0
        )
    cumulative_RV = probabilities_RV.double().cumsum(-1)
    thresholds_R1 = uniforms_R.double().unsqueeze(1) * cumulative_RV[:, -1:]
    # right=True: a threshold of exactly 0 must not pick a token of probability 0
    drawn_R1 = torch.searchsorted(cumulative_RV, thresholds_R1, right=True)
    return drawn_R1.squeeze(1).clamp(max=logprobs_RV.shape[-1] - 1)
