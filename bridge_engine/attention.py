"""Attention of completions that share their prompt, within a model's own forward pass.

All tokens of such a micro-batch lie in one row of N, so that whatever treats each token by itself
(projections, norms, the MLP: nearly all the work) sees a prompt once and no padding between rows.
Attention alone has to know who belongs to whom. `attend` takes the row apart: prompts attend to
themselves, completions to their prompt and to what came before in themselves, each by torch's
attention over small rectangles. It stands where transformers looks its `sdpa` attention up, and
is that one for every pass that names no layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True, slots=True)
class Block:
    """B completions of at most T tokens, row after row."""

    begin: int
    """Where they begin among the N tokens."""
    length: int
    """T."""
    prompts_B: Tensor
    """Which prompt each goes on from."""
    mask_B1TL: Tensor
    """True where a token attends: of the L columns the first are the prompt's, T its own."""


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """How the row of N tokens is made up: prompts, each padded to one length, then the blocks."""

    prompts: int
    length: int
    blocks: tuple[Block, ...]


def seen_behind(lengths_B1: Tensor, padded: int, length: int) -> Tensor:
    """The mask of completions of so many tokens behind prompts of those lengths, which are padded
    to one."""
    prompt_BTL = (torch.arange(padded) < lengths_B1).unsqueeze(1).expand(-1, length, -1)
    own_BTL = torch.ones(length, length, dtype=torch.bool).tril().expand(len(lengths_B1), -1, -1)
    return torch.cat((prompt_BTL, own_BTL), 2).unsqueeze(1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared: SharedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: 1 × heads × N × E each, and 1 × N × heads × E."""
    if shared is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole

    def rectangle(x_1HNE: Tensor, begin: int, rows: int, length: int) -> Tensor:
        """rows × heads × length × E"""
        _, heads, _, depth = x_1HNE.shape
        part_HME = x_1HNE[0, :, begin : begin + rows * length]
        return part_HME.reshape(heads, rows, length, depth).transpose(0, 1)

    size = shared.prompts, shared.length
    q, k_PHSE, v_PHSE = (rectangle(x, 0, *size) for x in (query, key, value))
    y_PSHE, _ = sdpa_attention_forward(module, q, k_PHSE, v_PHSE, None, **options)
    found = [y_PSHE.flatten(0, 1)]
    for block in shared.blocks:
        place = block.begin, len(block.prompts_B), block.length
        q = rectangle(query, *place)
        k = torch.cat((k_PHSE[block.prompts_B], rectangle(key, *place)), 2)
        v = torch.cat((v_PHSE[block.prompts_B], rectangle(value, *place)), 2)
        y_BTHE, _ = sdpa_attention_forward(module, q, k, v, block.mask_B1TL, **options)
        found.append(y_BTHE.flatten(0, 1))
    return torch.cat(found).unsqueeze(0), None


AttentionInterface.register("sdpa", attend)
