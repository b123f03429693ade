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
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from bridge_engine.logits import head_logits
from bridge_engine.rollout.decoding import RoomyLayer, decoding, is_plain

Draws = torch.Generator | Sequence[torch.Generator] | None
"""Where randomness comes from: one generator for all rows, or one for each row."""
BLOCK = 256
"""Tokens of the vocabulary that are looked at together."""
BELOW_ONE = 1 - 2**-40
"""The largest share that is looked for: 1 itself lies behind the last token."""


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
    generator: Draws = None,
    repeats: int = 1,
    batch_size: int = 64,
    rows: Sequence[int] | None = None,
) -> list[Completion]:
    """Draws `repeats` completions of each prompt; those of one prompt stand together, in order.
    With `rows`, these of them alone, with the random numbers they have among all.

    `generator` (one for all rows, or one a row) may be None only at temperature 0. At most
    `batch_size` sequences are decoded at once; a prompt's key-value cache is computed once for all
    its completions among them.
    """
    total = len(prompts) * repeats
    uniforms_RT = _uniforms(total, params.max_new_tokens, generator)
    completions = {row: Completion() for row in (range(total) if rows is None else rows)}
    # prompts of like length together: less padding; the order of the answers is the caller's
    ordered = sorted(completions, key=lambda row: len(prompts[row // repeats]))
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
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
    return list(completions.values())


def _uniforms(rows: int, tokens: int, draws: Draws) -> Tensor:
    """A uniform number for each row and position: R × T."""
    if draws is None:
        return torch.zeros(rows, tokens)
    if isinstance(draws, torch.Generator):
        return torch.rand(rows, tokens, generator=draws)
    if len(draws) != rows:
        raise ValueError(f"{len(draws)} generators for {rows} rows")
    return torch.stack([torch.rand(tokens, generator=one) for one in draws])


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
    longest, count = max(map(len, prompts)), params.max_new_tokens
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest + count, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = True
    mask = mask.to(device)
    cache = DynamicCache(config=model.config)
    hidden_BLD = model.base_model(
        input_ids=tokens.to(device),
        attention_mask=mask[:, :longest],
        position_ids=(mask[:, :longest].cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    rows_R = torch.tensor(prompt_of_row, device=device)
    hidden_RD, mask = hidden_BLD[rows_R, -1], mask[rows_R]
    positions_R = mask[:, :longest].sum(1)
    plain = is_plain(model, cache)
    if plain:
        cache.layers = [RoomyLayer(layer, rows_R, count) for layer in cache.layers]
        mask = torch.zeros(mask.shape, dtype=hidden_RD.dtype, device=device).masked_fill_(
            ~mask, -torch.inf
        )[:, None, None]
    elif len(prompt_of_row) > len(prompts):
        cache.batch_select_indices(rows_R)
    uniforms_RT = uniforms_RT.to(device)
    alive = list(completions)

    for step in range(count):
        drawn_R, logprobs_R = _draw(head_logits(model, hidden_RD), params, uniforms_RT[:, step])
        keep: list[int] = []
        for row, (token, logprob) in enumerate(
            zip(drawn_R.tolist(), logprobs_R.tolist(), strict=True)
        ):
            completion = alive[row]
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.finished = token in eos_ids
            if not completion.finished:
                keep.append(row)
        if not keep or step + 1 == count:
            return
        if len(keep) < len(alive):
            keep_R = torch.tensor(keep, device=device)
            cache.batch_select_indices(keep_R)
            alive = [alive[row] for row in keep]
            mask, drawn_R = mask[keep_R], drawn_R[keep_R]
            positions_R, uniforms_RT = positions_R[keep_R], uniforms_RT[keep_R]
        with decoding(model) if plain else nullcontext():
            hidden_RD = model.base_model(
                input_ids=drawn_R.unsqueeze(1),
                attention_mask=mask[..., : longest + step + 1],
                position_ids=(positions_R + step).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]


def _draw(logits_RV: Tensor, params: SamplingParams, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """(one token a row, its log-probability before temperature and top_p), both R.

    The token is the inverse of the cumulative distribution at that row's uniform number.
    """
    logits_RV = logits_RV.float()
    highest_R1 = logits_RV.amax(-1, keepdim=True)
    weights_RV = (logits_RV - highest_R1).exp_()
    totals_R1 = weights_RV.sum(-1, keepdim=True)
    if params.temperature == 0:
        drawn_R1 = logits_RV.argmax(-1, keepdim=True)
    elif params.temperature == 1 and params.top_p == 1:
        drawn_R1 = inverse(weights_RV, uniforms_R.unsqueeze(1))
    else:
        probabilities_RV = torch.softmax(logits_RV / params.temperature, dim=-1)
        drawn_R1 = inverse(nucleus(probabilities_RV, params.top_p), uniforms_R.unsqueeze(1))
    logprobs_R1 = logits_RV.gather(1, drawn_R1) - highest_R1 - totals_R1.log()
    return drawn_R1.squeeze(1), logprobs_R1.squeeze(1)


def nucleus(probabilities_RV: Tensor, top_p: float | Tensor) -> Tensor:
    """The probabilities within the nucleus, 0 outside; `top_p` may be one a row (R × 1)."""
    if isinstance(top_p, float | int) and top_p == 1:
        return probabilities_RV
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True)
    outside_RV = sorted_RV.cumsum(-1) - sorted_RV >= top_p
    return probabilities_RV.masked_fill(outside_RV.gather(1, order_RV.argsort(-1)), 0.0)


def inverse(weights_RV: Tensor, uniforms_R1: Tensor) -> Tensor:
    """Where each row's cumulated weight passes its uniform number's share of the whole: R × 1.

    In two looks, which block of the vocabulary and where in it: to cumulate fifty thousand weights
    in float64, one row after another, takes longer than all the rest of the draw.
    """
    padded_RV = F.pad(weights_RV, (0, -weights_RV.shape[-1] % BLOCK))
    blocks_RNK = padded_RV.view(len(padded_RV), -1, BLOCK)
    block_R1, uniforms_R1 = _search(blocks_RNK.sum(-1), uniforms_R1.double())
    inside_RK = blocks_RNK.gather(1, block_R1.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    place_R1, _ = _search(inside_RK, uniforms_R1)
    return (block_R1 * BLOCK + place_R1).clamp(max=weights_RV.shape[-1] - 1)


def _search(weights_RN: Tensor, uniforms_R1: Tensor) -> tuple[Tensor, Tensor]:
    """(the place where the cumulated weight passes u · total, how far into it that is: 0 to 1)."""
    cumulative_RN = weights_RN.double().cumsum(-1)
    thresholds_R1 = uniforms_R1 * cumulative_RN[:, -1:]
    # right=True: a threshold of exactly 0 must not pick a place of weight 0
    place_R1 = torch.searchsorted(cumulative_RN, thresholds_R1, right=True)
    place_R1 = place_R1.clamp(max=weights_RN.shape[-1] - 1)
    weight_R1 = weights_RN.gather(1, place_R1).double()
    before_R1 = cumulative_RN.gather(1, place_R1) - weight_R1
    return place_R1, ((thresholds_R1 - before_R1) / weight_R1).clamp(0, BELOW_ONE)
