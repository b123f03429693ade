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
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FEW_PAIRS = 1 << 20
"""Pairs of a query and a key, over all rows and heads, whose weights are kept: 4 MB a layer."""


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

    sizes = [shared.prompts * shared.length]
    sizes += [len(block.prompts_B) * block.length for block in shared.blocks]
    # taken apart in one go: on the way back the parts' gradients are put together in one, too
    parts = zip(*(torch.split(x.squeeze(0), sizes, 1) for x in (query, key, value)), strict=True)
    q, k_PHSE, v_PHSE = (_rectangle(x, shared.length) for x in next(parts))
    y_PSHE, _ = sdpa_attention_forward(module, q, k_PHSE, v_PHSE, None, **options)
    found = [y_PSHE.flatten(0, 1)]
    for block, own in zip(shared.blocks, parts, strict=True):
        q, own_k, own_v = (_rectangle(x, block.length) for x in own)
        k = torch.cat((k_PHSE[block.prompts_B], own_k), 2)
        v = torch.cat((v_PHSE[block.prompts_B], own_v), 2)
        y_BTHE = _attended(module, q, k, v, block.mask_B1TL, options)
        found.append(y_BTHE.flatten(0, 1))
    return torch.cat(found).unsqueeze(0), None


def _rectangle(x_HME: Tensor, length: int) -> Tensor:
    """rows × heads × length × E"""
    heads, _, depth = x_HME.shape
    return x_HME.view(heads, -1, length, depth).transpose(0, 1)


def _attended(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask_B1TL: Tensor, options: dict[str, Any]
) -> Tensor:
    """B × T × heads × E."""
    few = q[..., 0].numel() * k.shape[2] <= FEW_PAIRS and not options.get("dropout")
    exact = q.dtype.itemsize >= 4 and not torch.is_autocast_enabled(q.device.type)
    if few and exact and q.device.type == "cpu":
        y_BHTE: Tensor = _FewPairs.apply(  # type: ignore[no-untyped-call]
            q, k, v, mask_B1TL, options["scaling"]
        )
        return y_BHTE.transpose(1, 2)
    y_BTHE: Tensor = sdpa_attention_forward(module, q, k, v, mask_B1TL, **options)[0]
    return y_BTHE


class _FewPairs(torch.autograd.Function):
    """Attention that keeps its weights, B × heads × T × L. Where they are few a CPU is faster so
    (1.6 times) than with torch's own, which computes them again on the way back: the query heads of
    one key head stand as one sequence of queries, and keys and values are not repeated for them."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BKLE: Tensor, v_BKLE: Tensor, mask_B1TL: Tensor, scale: float
    ) -> Tensor:
        size, keys = q_BHTE.shape, k_BKLE.shape
        k_NLE, v_NLE = k_BKLE.flatten(0, 1), v_BKLE.flatten(0, 1)
        q_NGE = q_BHTE.reshape(len(k_NLE), -1, size[3])
        scores_NGL = torch.bmm(q_NGE, k_NLE.transpose(1, 2)).mul_(scale)
        bias_B1TL = torch.zeros_like(mask_B1TL, dtype=q_BHTE.dtype).masked_fill_(~mask_B1TL, -inf)
        scores_NGL.view(*size[:3], keys[2]).add_(bias_B1TL)
        weights_NGL = torch.softmax(scores_NGL, -1)
        ctx.save_for_backward(q_NGE, k_NLE, v_NLE, weights_NGL)
        ctx.scale, ctx.size, ctx.keys = scale, size, keys
        return torch.bmm(weights_NGL, v_NLE).view(size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHTE: Tensor) -> tuple[Tensor | None, ...]:
        q_NGE, k_NLE, v_NLE, weights_NGL = ctx.saved_tensors
        g_NGE = gradient_BHTE.reshape(q_NGE.shape)
        v_ = torch.bmm(weights_NGL.transpose(1, 2), g_NGE)
        weights_ = torch.bmm(g_NGE, v_NLE.transpose(1, 2))
        scores_ = torch._softmax_backward_data(weights_, weights_NGL, -1, weights_NGL.dtype)
        q_ = torch.bmm(scores_, k_NLE).mul_(ctx.scale)
        k_ = torch.bmm(scores_.transpose(1, 2), q_NGE).mul_(ctx.scale)
        return q_.view(ctx.size), k_.view(ctx.keys), v_.view(ctx.keys), None, None


AttentionInterface.register("sdpa", attend)
