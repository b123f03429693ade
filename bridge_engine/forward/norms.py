"""RMSNorm in half the passes over memory.

transformers writes it as seven small operations, and autograd goes back through each of them. On a
CPU, where the tokens of a micro-batch do not fit into its caches, that is a fifth of what a layer
does besides multiplying matrices. As one function it keeps one tensor for the backward pass; a GPU
has torch's own kernel. `bridge_engine.forward.light` puts it into a model's norms.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + epsilon) · weight over the last dimension (… × D), in float32 at least.

    The weight is D, or, where no gradient is wanted, … × D: one for each of what comes before."""
    if x.device.type != "cpu":
        if weight.dim() > 1:
            return F.rms_norm(x, weight.shape[-1:], None, epsilon) * weight
        return F.rms_norm(x, weight.shape, weight, epsilon)
    if not torch.is_grad_enabled():
        return _unit(x, epsilon)[0] * weight
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


def exact(x: Tensor) -> Tensor:
    """In float32 at least. (To ask torch for what is there already takes longer than to look.)"""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _unit(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x / its root mean square, what it was multiplied with for that: … × 1)."""
    precise = exact(x)
    length = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
    little = _scalar(epsilon, precise.dtype)
    shrink = torch.addcmul(little, length, length, value=1 / x.shape[-1]).rsqrt_()
    unit = precise * shrink
    return unit if precise is x else unit.to(x.dtype), shrink


@cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor once made: torch makes one of every number that it is given, each time."""
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=dtype, device="cpu")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        unit, shrink = _unit(x, epsilon)
        ctx.save_for_backward(unit, shrink, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With u = x / its root mean square r, and p = gradient · u:
        ∂x = (gradient · weight − u · mean(p · weight)) / r, ∂weight = Σ p."""
        unit, shrink, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        g, u = gradient.to(shrink.dtype), unit.to(shrink.dtype)
        x_ = weight_ = None
        p = (g * u).flatten(0, -2)
        if for_weight:
            weight_ = p.sum(0).to(weight.dtype)
        if for_x:
            along = torch.mv(p, weight.to(p.dtype)).div_(-p.shape[-1]).view_as(shrink)
            x_ = (g * weight).addcmul_(u, along).mul_(shrink).to(unit.dtype)
        return x_, weight_, None
