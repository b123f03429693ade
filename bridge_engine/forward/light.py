"""A model's modules, made to compute what they compute in fewer passes over memory.

transformers' modules are written to be read: an RMSNorm is seven operations, a turn to rotary
positions six. Those that are one of these, which is tried and not read off their names, get a class
of the same name whose forward pass takes the engine's functions, in training too; whatever is not
recognised is left as it is. It is for a CPU that it pays: on a GPU norms are torch's own, and
positions are left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from bridge_engine.forward.norms import rms_norm
from bridge_engine.forward.rotation import turn

_TURN = "apply_rotary_pos_emb"
"""What transformers' modules of attention call it."""


def lighten(model: nn.Module) -> None:
    """Lets the model's RMSNorms and rotary positions be computed by the engine."""
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm") and _is_one(module):
            module.__class__ = _light_norm(kind)
        elif kind.__name__.endswith("Attention") and _turns_by_halves(kind):
            module.__class__ = _light_attention(kind)


def _with_forward(kind: type[Any], forward: Callable[..., Any]) -> type[Any]:
    """The same class with another forward pass, so that copies and wrappers find it."""
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


# --------------------------------------------------------------------------- norms


@cache
def _light_norm(kind: type[Any]) -> type[Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return _with_forward(kind, forward)


@torch.no_grad()
def _is_one(norm: Any) -> bool:
    """Has it but one weight, and does it say the same? (Gemma's adds 1 to its weight.)"""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.dim() != 1 or len(list(norm.parameters())) != 1:
        return False
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype)
    x = x.view(2, -1)
    precise = weight.dtype in (torch.float32, torch.float64)
    found, expected = rms_norm(x, weight, epsilon).float(), norm(x).float()
    if not precise and x.device.type == "cpu" and (found == expected).float().mean() < 0.9:
        return False  # it rounds but once, as OLMo's: behind its weight
    return bool((found - expected).norm() <= (1e-5 if precise else 1e-2) * expected.norm())


# --------------------------------------------------------------------------- rotary positions


@cache
def _light_attention(kind: type[Any]) -> type[Any]:
    """Its forward pass is its own, but finds another function under the name of the one it calls:
    what a family of models does around that is for transformers to say."""
    theirs: Any = kind.forward
    plain: Callable[..., Any] = theirs.__globals__[_TURN]

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        alike = q.dtype == k.dtype == cos.dtype == sin.dtype
        whole = q.shape[-1] == cos.shape[-1] and q.dim() == cos.dim() + 1
        asked = not rest and named.keys() <= {"unsqueeze_dim"}
        ours = q.device.type == "cpu" and alike and whole and asked
        function: Callable[..., Any] = turn if ours else plain
        return function(q, k, cos, sin, *rest, **named)

    names = theirs.__globals__ | {_TURN: turned}
    forward = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)
    forward.__kwdefaults__ = theirs.__kwdefaults__
    return _with_forward(kind, forward)


@cache
@torch.no_grad()
def _turns_by_halves(kind: type[Any]) -> bool:
    """Does its forward pass call a function that does what `turn` does? (Some turn neighbours.)"""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return False
    plain: Callable[..., Any] | None = forward.__globals__.get(_TURN)
    if plain is None or _TURN not in forward.__code__.co_names:
        return False
    q, k = torch.linspace(-1, 2, 48).view(1, 2, 3, 8), torch.linspace(3, -1, 24).view(1, 1, 3, 8)
    angles = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
    try:
        mine, theirs = (f(q, k, angles.cos(), angles.sin()) for f in (turn, plain))
    except (TypeError, RuntimeError):  # it is asked in another way
        return False
    return all(torch.allclose(*both, atol=1e-6) for both in zip(mine, theirs, strict=True))
