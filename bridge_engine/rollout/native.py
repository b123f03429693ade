"""The in-process sampler: batched, with a KV cache, dropping rows that have ended.

transformers' `generate` keeps finished rows in the batch, and takes another pass over the
vocabulary to say how likely its draws were. Here rows leave the batch after their EOS, and every
token comes with the log-probability it was drawn with, so that training needs no scoring pass: in
float32 it equals the training forward pass to 1e-5.

Every draw uses one uniform number fixed by (generator, row, position), not by who else is in the
batch: the same row gets the same randomness however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_engine.rollout import lean
from bridge_engine.rollout.decoding import Decoder, Prompts

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
    decoder, device = lean.decoder(model), next(model.parameters()).device
    # prompts of like length together: less padding; the order of the answers is the caller's
    ordered = sorted(completions, key=lambda row: len(prompts[row // repeats]))
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        distinct = list(dict.fromkeys(row // repeats for row in chosen))
        places = {prompt: place for place, prompt in enumerate(distinct)}
        _decode(
            decoder,
            [prompts[i] for i in distinct],
            [places[row // repeats] for row in chosen],
            params,
            [completions[row] for row in chosen],
            uniforms_RT[chosen].to(device),
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
    decoder: Decoder,
    prompts: list[Sequence[int]],
    prompt_of_row: list[int],
    params: SamplingParams,
    completions: list[Completion],
    uniforms_RT: Tensor,
    eos_ids: frozenset[int],
    pad_id: int,
) -> None:
    """One batch: a prefill over the distinct prompts, then one token a row at a time."""
    device = uniforms_RT.device
    read = Prompts.of(prompts, pad_id=pad_id, device=device)
    rows_R = torch.tensor(prompt_of_row, device=device)
    logits_RV = decoder.start(read, rows_R, params.max_new_tokens)
    batch = list(completions)

    for step in range(params.max_new_tokens):
        drawn_R, logprobs_R = _draw(logits_RV, params, uniforms_RT[:, step])
        for completion, token, logprob in zip(
            batch, drawn_R.tolist(), logprobs_R.tolist(), strict=True
        ):
            if not completion.finished:
                completion.tokens.append(token)
                completion.logprobs.append(logprob)
                completion.finished = token in eos_ids
        alive = [row for row, completion in enumerate(batch) if not completion.finished]
        if not alive or step + 1 == params.max_new_tokens:
            return
        if rung(len(alive)) < len(batch):
            ended = [row for row, completion in enumerate(batch) if completion.finished]
            keep = sorted(alive + ended[: rung(len(alive)) - len(alive)])
            keep_R = torch.tensor(keep, device=device)
            decoder.keep(keep_R)
            batch = [batch[row] for row in keep]
            drawn_R, uniforms_RT = drawn_R[keep_R], uniforms_RT[keep_R]
        logits_RV = decoder.step(drawn_R)


def rung(rows: int) -> int:
    """The number of rows that so many are decoded in: one of few, because to let a row go copies
    what was read of all others, and products prepare themselves for each number of rows anew."""
    return -(-rows // 8) * 8 if rows > 8 else 1 << (rows - 1).bit_length()


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
    in float64, one row after another, takes longer than all the rest of the draw. In one, where a
    second would save nothing.
    """
    uniforms_R1 = uniforms_R1.double()
    if weights_RV.shape[-1] <= 2 * BLOCK:
        return _passed(weights_RV.double().cumsum(-1), uniforms_R1)[0]
    missing = -weights_RV.shape[-1] % BLOCK
    padded_RV = F.pad(weights_RV, (0, missing)) if missing else weights_RV  # it would copy all
    blocks_RNK = padded_RV.view(len(padded_RV), -1, BLOCK)
    totals_RN = blocks_RNK.sum(-1)
    cumulative_RN = totals_RN.double().cumsum(-1)
    block_R1, thresholds_R1 = _passed(cumulative_RN, uniforms_R1)
    total_R1 = totals_RN.gather(1, block_R1).double()
    before_R1 = cumulative_RN.gather(1, block_R1) - total_R1
    inside_R1 = ((thresholds_R1 - before_R1) / total_R1).clamp(0, BELOW_ONE)
    inside_RK = blocks_RNK.gather(1, block_R1.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    place_R1, _ = _passed(inside_RK.double().cumsum(-1), inside_R1)
    return (block_R1 * BLOCK + place_R1).clamp(max=weights_RV.shape[-1] - 1)


def _passed(cumulative_RN: Tensor, shares_R1: Tensor) -> tuple[Tensor, Tensor]:
    """(the place where the cumulated weight passes this share of the whole, the share itself)."""
    thresholds_R1 = shares_R1 * cumulative_RN[:, -1:]
    # right=True: a threshold of exactly 0 must not pick a place of weight 0
    place_R1 = torch.searchsorted(cumulative_RN, thresholds_R1, right=True)
    return place_R1.clamp(max=cumulative_RN.shape[-1] - 1), thresholds_R1
