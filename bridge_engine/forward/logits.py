"""From hidden states to logits, for the positions that are wanted and no others.

transformers computes logits for whole sequences; training wants them where a completion token is
predicted, and sampling at the last position. What a model's forward pass does to its head's output
is done here too, and `check` compares the two once when a model is loaded, so that a family with
yet another twist is refused rather than trained on a policy that nobody serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridge_engine.errors import EngineError


def head_logits(model: Any, hidden_ND: Tensor) -> Tensor:
    """Logits (N × vocabulary) of last hidden states (N × D), as the model's own forward gives."""
    logits_NV: Tensor = model.get_output_embeddings()(hidden_ND)
    config = model.config
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits_NV = logits_NV / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits_NV = logits_NV * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV


@torch.no_grad()
def check(model: Any) -> None:
    """EngineError (`model_unsupported`) unless `head_logits` is what the model's forward gives."""
    if model.get_output_embeddings() is None:
        raise _unsupported("it has no output head")
    device = next(model.parameters()).device
    tokens = torch.arange(1, 6, device=device).unsqueeze(0) % model.config.vocab_size
    expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    hidden_LD = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    difference = (head_logits(model, hidden_LD).float() - expected).abs().max()
    if not difference <= 1e-3 * expected.abs().max():
        raise _unsupported("its logits are computed in a way that Bridge does not know")


def _unsupported(why: str) -> EngineError:
    return EngineError(
        f"this model cannot be trained: {why}; Llama, Mistral, Qwen, Gemma and Phi models can",
        code="model_unsupported",
        param="model",
    )
