"""A group's prompt passed once for all its completions, where that saves computing.

Group-based RL trains on G completions of each prompt, and a pass over padded sequences computes the
prompt G times over. With its completions end to end behind one prompt, each blind to the others,
the same log-probabilities and gradients come out of 1/G of the prompt's work. The price is
attention over a row as long as all of them together, which grows with its square: for short
prompts or long completions it costs more than it saves, so each group is weighed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bridge_engine.logprobs import completion_logprobs
from bridge_engine.sequences import TokenSequence, pad, row_length, share


@dataclass(frozen=True)
class Sharing:
    """What a model's forward pass costs, in floating-point operations."""

    token: float
    """Of a token through the linear layers."""
    pair: float
    """Of a token attending to one other, in all layers."""

    def pays(self, group: Sequence[TokenSequence]) -> bool:
        """Is a row of all of them cheaper than a row each? (In a row each, causal attention skips
        what comes after; with a mask, it computes all pairs.)"""
        row = row_length(group)
        shared = row * (self.token + self.pair * row)
        alone = sum(len(s) * (self.token + self.pair * len(s) / 2) for s in group)
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
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    linear = sum(p.numel() for p in model.parameters() if p not in embeddings)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Sharing(token=2.0 * linear, pair=4.0 * width * config.num_hidden_layers)


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Does a family that takes no such masks, or not as they are meant, give itself away?"""
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    group = [
        TokenSequence([t % size for t in (1, 2, 3)], [t % size for t in completion])
        for completion in ((4, 5, 6, 7), (9, 8), (4, 9, 5))
    ]
    one, _ = completion_logprobs(model, share([group], pad_id=0, device=device))
    other, _ = completion_logprobs(model, pad(group, pad_id=0, device=device))
    return bool((one - other).norm() <= 1e-2 * other.norm())
