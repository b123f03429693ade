"""Log-probabilities of completions: the one forward pass that training makes.

The logits of a micro-batch, N tokens × V of the vocabulary, are by far its largest tensor: 1 000
tokens of Qwen2.5 make 600 MB, several times over in a backward pass. They never exist at once.
Completion tokens are gone through in chunks, and of each is kept what the backward pass needs:

- *The head is frozen* (a LoRA student): the gradient of each token's log-probability with respect
  to its own hidden state, D numbers instead of V. It depends on no other token and on nothing that
  the loss will do with it, so that it can be computed while the logits are there, and costs no
  more now than later.
- *The head is trained* (a full student): nothing but the hidden states; the backward pass computes
  the chunk's logits again (torch.utils.checkpoint). Not where all of them are few: then they are
  kept, a chunk after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridge_engine.forward.logits import head_logits
from bridge_engine.forward.recomputation import recomputing
from bridge_engine.forward.sequences import MicroBatch

LOGITS_AT_ONCE = 1 << 24
"""Tokens × vocabulary of one chunk; 64 MB in float32, of which about three exist at a time.

On a CPU chunks of 64 to 1024 tokens take the same time to within 5 % (V = 49 152); a GPU wants the
larger ones, and 110 tokens of V = 151 936 still keep its matrix units busy."""


KEPT_LOGITS = 1 << 26
"""Tokens × vocabulary that a trained head keeps rather than computes again; 256 MB in float32,
beside the 16 bytes for each of its weights that a full student takes anyway."""


def completion_logprobs(model: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(logprobs_BT, entropy_BT) of the completion tokens as the model stands; padding 0.

    Logits are computed where a completion token is predicted and nowhere else: neither for
    prompts nor for padding. Float32 at least. entropy carries no gradient, and the gradient of
    logprobs is no function to differentiate again.
    """
    options: dict[str, Any] = {}
    if batch.shared is not None:
        # who attends to whom is in the layout: any mask keeps transformers from making one
        any_1111 = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.tokens_RL.device)
        options = {"attention_mask": any_1111, "shared": batch.shared}
    with recomputing(model):
        hidden_RLD = model.base_model(
            input_ids=batch.tokens_RL,
            position_ids=batch.position_ids_RL,
            use_cache=False,
            **options,
        ).last_hidden_state
    hidden_ND = hidden_RLD.flatten(0, 1)[batch.predictions_N]
    logprobs_N, entropy_N = target_logprobs(model, hidden_ND, batch.targets_N)
    keep_BT = batch.mask_BT.bool()
    empty_BT = logprobs_N.new_zeros(keep_BT.shape)
    return (
        empty_BT.masked_scatter(keep_BT, logprobs_N),
        empty_BT.masked_scatter(keep_BT, entropy_N),
    )


def target_logprobs(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy of the distribution it is from), both (N,), from
    last hidden states."""
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    compute: Callable[..., tuple[Tensor, Tensor]] = partial(_all_at_once, model)
    if torch.is_grad_enabled():
        if not any(p.requires_grad for p in head.parameters()):
            if hidden_ND.requires_grad:
                compute = partial(_linearised, model)
        elif len(hidden_ND) * vocabulary > KEPT_LOGITS:
            # nothing in the head is random
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True)
    found = [compute(hidden, targets) for hidden, targets in chunks]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _all_at_once(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps one N × V tensor for the backward pass. (log_softmax, and not the target's logit less
    logsumexp: that one keeps the logits, and makes two more of them on its way back.)"""
    logits_NV = head_logits(model, hidden_ND)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    del logits_NV
    logprobs_N = logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_N = -logprobs_NV.exp().mul_(logprobs_NV).sum(-1)
    return logprobs_N, entropy_N


def _linearised(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Values and their gradient together, so that nothing N × V outlives this call."""
    leaf_ND = hidden_ND.detach().requires_grad_()
    logprobs_N, entropy_N = _all_at_once(model, leaf_ND, targets_N)
    # the sum's gradient is each token's own: none depends on another's hidden state
    (slope_ND,) = torch.autograd.grad(logprobs_N.sum(), leaf_ND)
    exact = logprobs_N.dtype
    zero_ND = hidden_ND.to(exact) - leaf_ND.detach().to(exact)  # but not its gradient
    return logprobs_N.detach() + (zero_ND * slope_ND).sum(-1), entropy_N
