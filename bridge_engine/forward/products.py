"""Linear layers as the engine multiplies them: the same products in fewer and faster passes.

With an adapter a layer is a wide product and two narrow ones. Written as one function, its results
are added up where they are instead of in further tensors, and narrow products are multiplied in the
order that suits their shapes: a BLAS takes several times as long for the other one.

`pack` is for weights that few rows meet again and again, and lays them out for that once: oneDNN,
which torch brings along, in its own form, with which a product takes a half to three quarters of a
BLAS's time; where Intel's BLAS is at home and a product is small, transposed, which is faster yet.
Not in training: oneDNN prepares something for every new number of rows, and keeps it, and each pass
has another number; and with as many rows as a pass has, how weights lie makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bridge_engine.process.processor import vendor

PACKED_ROWS = 64
"""Rows that packed weights are laid out for; they take any number."""
FEW_WEIGHTS = 1 << 18
"""With fewer in a product, oneDNN gains nothing on a processor without AVX-512: its own time for a
call is a third of the product's."""
FEW_FOR_INTEL = 1 << 20
"""With fewer, MKL with transposed weights takes 0.5 to 0.8 of oneDNN's time for 16 to 64 rows on an
Intel processor with AVX-512. On others' it does not know AVX-512."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x · weightᵀ + bias + scale · (x · Aᵀ) · Bᵀ, with the adapter (A: rank × in, B: out × rank)
    multiplied in the dtype of x."""
    if adapter is None:
        return F.linear(x, weight, bias)
    a, b = adapter
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a) * scale, b)
    y: Tensor = _AdaptedLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        y = F.linear(rows, weight, bias)
        narrow_rN = (a.to(x.dtype) @ rows.t()).mul_(scale)
        y.addmm_(narrow_rN.t(), b.to(x.dtype).t())
        ctx.save_for_backward(rows, weight, a, b, narrow_rN)
        ctx.scale = scale
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, narrow_rN = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        g = gradient.flatten(0, -2)
        x_ = g @ weight if for_x else None
        weight_ = g.t() @ rows if for_weight else None
        bias_ = g.sum(0) if for_bias else None
        back_rN = (b.to(g.dtype).t() @ g.t()).mul_(ctx.scale)
        a_ = (back_rN @ rows).to(a.dtype)
        b_ = (narrow_rN @ g).t().to(b.dtype)
        if x_ is not None:
            x_.addmm_(back_rN.t(), a.to(g.dtype))
        shaped = None if x_ is None else x_.view(*gradient.shape[:-1], weight.shape[1])
        return shaped, weight_, bias_, a_, b_, None


def pack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Callable[[Tensor], Sequence[Tensor]]:
    """One input through several linear layers, again and again, without gradients: laid out for it
    where the processor can make use of that, which takes a copy of the weights."""
    first = weights[0]
    if not _has_onednn(first.device.type, first.dtype):
        return lambda x: [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    widths = [len(weight) for weight in weights]
    bias = None
    if any(b is not None for b in biases):
        each = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in each])
    weight = torch.cat(list(weights))
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        if weight.numel() < FEW_WEIGHTS:
            return lambda x: torch.split_with_sizes(F.linear(x, weight, bias), widths, -1)
    elif first.dtype == torch.float32 and weight.numel() < FEW_FOR_INTEL and _is_intels():
        transposed = weight.t().contiguous()

        def by_blas(x: Tensor) -> Sequence[Tensor]:
            rows = x if x.dim() == 2 else x.flatten(0, -2)
            y = rows @ transposed if bias is None else torch.addmm(bias, rows, transposed)
            y = y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
            return [y] if len(widths) == 1 else torch.split_with_sizes(y, widths, -1)

        return by_blas
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)

    def product(x: Tensor) -> Sequence[Tensor]:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return torch.split_with_sizes(y, widths, -1)

    return product


@cache
def _is_intels() -> bool:
    """Is Intel's BLAS on a processor of Intel's?"""
    return bool(torch._C.has_mkl) and vendor() == "GenuineIntel"


@cache
def _has_onednn(device: str, dtype: torch.dtype) -> bool:
    """Has this build of torch oneDNN's products for this processor and dtype?"""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        one = torch.ones(2, 2, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(one, 2)
        y = torch.ops.mkldnn._linear_pointwise(one, packed, one[0], "none", [], "")
        return bool((y == 3).all())
    except (AttributeError, RuntimeError):
        return False
