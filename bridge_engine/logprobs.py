"""Log-probabilities of completions: the one forward pass that training makes.

Logits are computed where a completion token is predicted and nowhere else: neither for prompts nor
for padding. Where even those would not fit (N tokens × the vocabulary), they are computed a piece
at a time, and again in the backward pass, so that only one piece ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridge_engine.logits import head_logits
from bridge_engine.sequences import Padded

LOGITS_AT_ONCE = 2**24
"""Numbers of one piece of logits (64 MB in float32; a pass holds a few copies of it). A piece is
computed twice, so what fits is not cut."""


def completion_logprobs(model: Any, batch: Padded) -> tuple[Tensor, Tensor]:
    """(logprobs_BT, entropy_BT) of the completion tokens as the model stands; padding 0.

    entropy carries no gradient. `batch` may be padded or packed; the answer is the same.
    """
    with _checkpointing(model):
        hidden_BLD = model.base_model(
            input_ids=batch.tokens_BL, position_ids=batch.position_ids_BL, use_cache=False
        ).last_hidden_state
    keep_BT = batch.mask_BT.bool()
    positions_BT = batch.positions_BT
    rows_BT = batch.rows_B.unsqueeze(1).expand_as(positions_BT)
    hidden_ND = hidden_BLD[rows_BT[keep_BT], positions_BT[keep_BT]]
    targets_N = batch.tokens_BL[rows_BT[keep_BT], positions_BT[keep_BT] + 1]
    logprobs_N, entropy_N = token_logprobs(model, hidden_ND, targets_N)
    empty_BT = logprobs_N.new_zeros(keep_BT.shape)
    return (
        empty_BT.masked_scatter(keep_BT, logprobs_N),
        empty_BT.masked_scatter(keep_BT, entropy_N),
    )


def token_logprobs(
    model: Any, hidden_ND: Tensor, targets_N: Tensor, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log π of each target, entropy of each distribution) from N last hidden states; float32 at
    least. Logits of more than `at_once` numbers (LOGITS_AT_ONCE) are computed in pieces."""
    size = max(1, (at_once or LOGITS_AT_ONCE) // model.config.vocab_size)
    if len(targets_N) <= size:
        return _piece(model, hidden_ND, targets_N)
    pieces = [
        checkpoint(_piece, model, hidden, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _piece(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = head_logits(model, hidden_ND)
    at_least_float32 = torch.promote_types(logits_NV.dtype, torch.float32)
    logprobs_NV = torch.log_softmax(logits_NV.to(at_least_float32), dim=-1)
    logprobs_N = logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_N, entropy_N


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """transformers' layers checkpoint their activations only while the model is in training mode;
    its dropouts are 0 (`bridge_engine.loading`), so nothing else comes of that mode."""
    wanted = getattr(model, "is_gradient_checkpointing", False) and torch.is_grad_enabled()
    if not wanted:
        yield
        return
    model.train()
    try:
        yield
    finally:
        model.eval()
