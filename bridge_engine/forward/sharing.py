"""A group's prompt passed once for all its completions, where that saves computing.

Group-based RL trains on G completions of each prompt, and a pass over padded sequences computes the
prompt G times over. Passed once, with all completions attending to it (`forward.attention`), it
makes the same log-probabilities and gradients from 1/G of its work. The price is attention with
a mask, which computes the half that causal attention skips: for a short prompt before long
completions it costs more than it saves, so each group is weighed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from bridge_engine.forward.attention import attend
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.forward.sequences import TokenSequence, pad, share


@dataclass(frozen=True)
class Sharing:
    """What a model's forward pass costs, in floating-point operations."""

    token: float
    """Of a token through the linear layers."""
    pair: float
    """Of a token attending to one other, in all layers."""

    def pays(self, group: Sequence[TokenSequence]) -> bool:
        """Is passing the prompt once cheaper than passing it with each of its completions?"""
        prompt = len(group[0].prompt)
        shared = prompt * (self.token + self.pair * prompt / 2)
        alone = 0.0
        for completion in (len(s.completion) for s in group):
            whole = prompt + completion
            shared += completion * (self.token + self.pair * whole)
            alone += whole * (self.token + self.pair * whole / 2)
        return shared < alone

    def split(
        self, sequences: Sequence[TokenSequence], size: int
    ) -> tuple[list[list[TokenSequence]], list[TokenSequence]]:
        """(groups of one prompt for which it pays, of at most `size` sequences; the others)."""
        by_prompt: dict[tuple[int, ...], list[TokenSequence]] = defaultdict(list)
        for sequence in sequences:
            by_prompt[tuple(sequence.prompt)].append(sequence)
        groups: list[list[TokenSequence]] = []
        alone: list[TokenSequence] = []
        for group in by_prompt.values():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                if self.pays(part):
                    groups.append(part)
                else:
                    alone += part
        return groups, alone


def sharing_of(model: Any) -> Sharing | None:
    """The costs of a model whose completions can share a prompt; None for one of another attention
    than torch's own over all tokens before (a sliding window, flash attention, …)."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation != "sdpa" or window or set(layers) != {"full_attention"}:
        return None
    if not _agrees(model):
        return None
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Sharing(
        token=2.0 * _weights_a_token_meets(model, config),
        pair=4.0 * width * config.num_hidden_layers,
    )


def _weights_a_token_meets(model: Any, config: Any) -> float:
    """Parameters but the embeddings; of experts, as many as a token is sent to."""
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for n in (getattr(config, name, None) for name in names) if n), 1)
    met: float = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    weights: float = sum(
        parameter.numel() * (met if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter not in embeddings
    )
    return weights


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Is each of its layers told of the layout, and does it then say what it says of each sequence
    by itself?"""
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    group = [
        TokenSequence([t % config.vocab_size for t in prompt], [t % config.vocab_size for t in end])
        for prompt in ((1, 2, 3), (8, 2, 1, 5, 7))
        for end in ((4, 5, 6, 7), (9, 8), (4, 9, 5))
    ]
    told = 0

    def counted(*given: Any, **options: Any) -> tuple[Tensor, None]:
        nonlocal told
        told += "shared" in options
        return attend(*given, **options)

    AttentionInterface.register("sdpa", counted)
    try:
        one, _ = completion_logprobs(model, share(group, pad_id=0, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever such a model makes of a layout: it is passed without
        return False
    finally:
        AttentionInterface.register("sdpa", attend)
    if told != config.num_hidden_layers:
        return False
    other, _ = completion_logprobs(model, pad(group, pad_id=0, device=device))
    return bool((one - other).norm() <= 1e-2 * other.norm())
