"""Rotary positions in half the passes over memory.

Queries and keys are turned by x · cos + (−x₂, x₁) · sin, where x₁ and x₂ are the halves of a head
(Su et al. 2021, as transformers lays it out). Written as that it is six operations and autograd
goes back through each of them; as one function it is three each way, and keeps nothing but cos and
sin. `bridge_engine.forward.light` puts it into a model's attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def turn(
    q_BHTE: Tensor, k_BKTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their tokens' positions; with 2, heads come behind tokens."""
    cos, sin = cos_BTE.unsqueeze(unsqueeze_dim), sin_BTE.unsqueeze(unsqueeze_dim)
    half = cos.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    q, k = (_Turned.apply(x, cos, signed) for x in (q_BHTE, k_BKTE))  # type: ignore[no-untyped-call]
    return q, k


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed = ctx.saved_tensors
        across = (gradient * signed).roll(gradient.shape[-1] // 2, -1)
        return across.addcmul_(gradient, cos), None, None
