"""Log-probabilities of completions: the one forward pass that training makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridge_engine.logits import head_logits
from bridge_engine.sequences import Padded


def completion_logprobs(model: Any, batch: Padded) -> tuple[Tensor, Tensor]:
    """(logprobs_BT, entropy_BT) of the completion tokens as the model stands; padding 0.

    Logits are computed where a completion token is predicted and nowhere else: neither for
    prompts nor for padding. entropy carries no gradient.
    """
    hidden_BLD = model.base_model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state
    keep_BT = batch.mask_BT.bool()
    positions_BT = batch.positions_BT
    rows_BT = torch.arange(len(positions_BT), device=positions_BT.device).unsqueeze(1)
    hidden_ND = hidden_BLD[rows_BT, positions_BT][keep_BT]
    targets_N = batch.tokens_BL[
        rows_BT, (positions_BT + 1).clamp(max=batch.tokens_BL.shape[1] - 1)
    ][keep_BT]
    logits_NV = head_logits(model, hidden_ND)
    at_least_float32 = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = torch.log_softmax(logits_NV.to(at_least_float32), dim=-1)
    logprobs_N = logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    empty_BT = logprobs_N.new_zeros(keep_BT.shape)
    return (
        empty_BT.masked_scatter(keep_BT, logprobs_N),
        empty_BT.masked_scatter(keep_BT, entropy_N),
    )
