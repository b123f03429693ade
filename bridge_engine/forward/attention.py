"""Attention of completions that share their prompt, within a model's own forward pass.

All tokens of such a micro-batch lie in one row of N, so that whatever treats each token by itself
(projections, norms, the MLP: nearly all the work) sees a prompt once and no padding between rows.
Attention alone has to know who belongs to whom. `attend` takes the row apart: prompts attend to
themselves, completions to their prompt and to what came before in themselves, each by torch's
attention over small rectangles. It stands where transformers looks its `sdpa` attention up, and
is that one for every pass that names no layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
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
    """B texts of at most T tokens each, text after text: prompts, or completions behind them."""

    begin: int
    """Where they begin among the N tokens."""
    length: int
    """T."""
    mask_B1TL: Tensor
    """True where a token attends: of the L columns the first are the prompt's, if there is one
    before it, and the last T its own. Of all prompts alike: the first dimension is 1."""
    rows: int
    """B."""
    prompts_B: Tensor | None = None
    """Which prompt each goes on from."""

    @property
    def tokens(self) -> int:
        """How many of the N are its."""
        return self.rows * self.length

    def of(self, x_NHE: Tensor) -> Tensor:
        """Its share of the row, as a view: B × H × T × E."""
        own_MHE = x_NHE[self.begin : self.begin + self.tokens]
        return own_MHE.view(self.rows, self.length, *x_NHE.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class SharedLayout:
    """How the row of N tokens is made up: prompts, each padded to one length, then the others."""

    prompts: Block
    completions: tuple[Block, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All, in order."""
        return self.prompts, *self.completions

    @cached_property
    def biases(self) -> tuple[Tensor, ...]:
        """What is added to the scores of each block, B or 1 × 1 × T × L; the same in all layers."""
        masks = [block.mask_B1TL for block in self.blocks]
        return tuple(torch.zeros(m.shape, device=m.device).masked_fill_(~m, -inf) for m in masks)

    @classmethod
    def of(cls, prompts: int, length: int, completions: Sequence[Block]) -> SharedLayout:
        """With so many prompts of at most that length, before the completions."""
        device = completions[0].mask_B1TL.device if completions else None
        mask_11SS = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        return cls(Block(0, length, mask_11SS, prompts), tuple(completions))


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

    if _few(shared, query, options):
        y_1NHE: Tensor = _FewPairs.apply(  # type: ignore[no-untyped-call]
            query, key, value, shared, options["scaling"]
        )
        return y_1NHE, None
    sizes = [block.tokens for block in shared.blocks]
    # taken apart in one go: on the way back the parts' gradients are put together in one, too
    apart = zip(*(torch.split(x.squeeze(0), sizes, 1) for x in (query, key, value)), strict=True)
    q, k_PHSE, v_PHSE = (_rectangle(x, shared.prompts.length) for x in next(apart))
    y_PSHE, _ = sdpa_attention_forward(module, q, k_PHSE, v_PHSE, None, **options)
    found = [y_PSHE.flatten(0, 1)]
    for block, own in zip(shared.completions, apart, strict=True):
        q, own_k, own_v = (_rectangle(x, block.length) for x in own)
        k = torch.cat((k_PHSE[block.prompts_B], own_k), 2)
        v = torch.cat((v_PHSE[block.prompts_B], own_v), 2)
        y_BTHE, _ = sdpa_attention_forward(module, q, k, v, block.mask_B1TL, **options)
        found.append(y_BTHE.flatten(0, 1))
    return torch.cat(found).unsqueeze(0), None


def _rectangle(x_HME: Tensor, length: int) -> Tensor:
    """rows × heads × length × E"""
    heads, _, depth = x_HME.shape
    return x_HME.view(heads, -1, length, depth).transpose(0, 1)


def _few(shared: SharedLayout, query_1HNE: Tensor, options: dict[str, Any]) -> bool:
    """Can the weights of all its pairs be kept, and be computed as exactly as torch's own are?"""
    exact = query_1HNE.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")
    pairs = query_1HNE.shape[1] * sum(b.tokens * b.mask_B1TL.shape[3] for b in shared.blocks)
    on_cpu = query_1HNE.device.type == "cpu"
    return on_cpu and exact and pairs <= FEW_PAIRS and not options.get("dropout")


class _FewPairs(torch.autograd.Function):
    """Attention that keeps its weights, B × heads × T × L of each block. Where they are few a CPU
    is faster so (1.6 times) than with torch's own, which computes them again on the way back: the
    query heads of one key head stand as one sequence of queries, keys and values are not repeated
    for them, and every block is read from the row and written to it in place."""

    @staticmethod
    def forward(
        ctx: Any,
        q_1HNE: Tensor,
        k_1KNE: Tensor,
        v_1KNE: Tensor,
        shared: SharedLayout,
        scale: float,
    ) -> Tensor:
        q_NHE, k_NKE, v_NKE = (x.squeeze(0).transpose(0, 1) for x in (q_1HNE, k_1KNE, v_1KNE))
        y_NHE = q_NHE.new_empty(*q_NHE.shape[:2], v_NKE.shape[2])
        kept: list[Tensor] = []
        for block, bias_B1TL in zip(shared.blocks, shared.biases, strict=True):
            k_CLE, v_CLE = (_seen(x, block, shared).flatten(0, 1) for x in (k_NKE, v_NKE))
            q_CGE = block.of(q_NHE).reshape(len(k_CLE), -1, q_NHE.shape[2])
            scores_CGL = _scaled(q_CGE, k_CLE.transpose(1, 2), scale)
            scores_CGL.view(block.rows, -1, *bias_B1TL.shape[2:]).add_(bias_B1TL)
            weights_CGL = torch.softmax(scores_CGL, -1)
            y_BHTE = block.of(y_NHE)
            y_BHTE.copy_(torch.bmm(weights_CGL, v_CLE).view(y_BHTE.shape))
            kept += [q_CGE, k_CLE, v_CLE, weights_CGL]
        ctx.save_for_backward(*kept)
        ctx.shared, ctx.scale = shared, scale
        ctx.shapes = q_NHE.shape, k_NKE.shape, v_NKE.shape
        return y_NHE.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1NHE: Tensor) -> tuple[Tensor | None, ...]:
        (g_NHE,) = gradient_1NHE
        q_, k_, v_ = (g_NHE.new_empty(shape) for shape in ctx.shapes)
        kept = iter(ctx.saved_tensors)
        for block in ctx.shared.blocks:
            q_CGE, k_CLE, v_CLE, weights_CGL = islice(kept, 4)
            g_CGE = block.of(g_NHE).reshape(*q_CGE.shape[:2], -1)
            weights_ = torch.bmm(g_CGE, v_CLE.transpose(1, 2))
            scores_ = torch._softmax_backward_data(weights_, weights_CGL, -1, weights_CGL.dtype)
            own = block.of(q_)
            own.copy_(_scaled(scores_, k_CLE, ctx.scale).view(own.shape))
            _give(k_, block, ctx.shared, _scaled(scores_.transpose(1, 2), q_CGE, ctx.scale))
            _give(v_, block, ctx.shared, torch.bmm(weights_CGL.transpose(1, 2), g_CGE))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_, k_, v_))
        return q, k, v, None, None


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · one · other, each a batch of matrices."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)


def _seen(x_NKE: Tensor, block: Block, shared: SharedLayout) -> Tensor:
    """Keys or values that the block attends to: B × K × L × E."""
    own_BKTE = block.of(x_NKE)
    if block.prompts_B is None:
        return own_BKTE.contiguous()
    rows, heads, _, depth = own_BKTE.shape
    seen_BKLE = x_NKE.new_empty(rows, heads, block.mask_B1TL.shape[3], depth)
    before, own = _parts(seen_BKLE, block)
    torch.index_select(shared.prompts.of(x_NKE), 0, block.prompts_B, out=before)
    own.copy_(own_BKTE)
    return seen_BKLE


def _give(x_NKE: Tensor, block: Block, shared: SharedLayout, gradient_CLE: Tensor) -> None:
    """The other way round: a gradient to what the block attends to, its own and its prompts'."""
    own_BKTE = block.of(x_NKE)
    rows, heads, _, depth = own_BKTE.shape
    before, own = _parts(gradient_CLE.view(rows, heads, -1, depth), block)
    own_BKTE.copy_(own)
    if block.prompts_B is not None:
        shared.prompts.of(x_NKE).index_add_(0, block.prompts_B, before)


def _parts(x_BKLE: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(the prompts', the block's own)."""
    before = x_BKLE.shape[2] - block.length
    return x_BKLE[:, :, :before], x_BKLE[:, :, before:]


AttentionInterface.register("sdpa", attend)
