"""A LoRA adapter's files, checked against the base they are for, as plain tensors.

PEFT wraps a model to hold adapters, and switches the whole model from one to another. Here every
row of a batch has its own (`inference.routing`), so only PEFT's format and its rules of which layer
is meant are used. What PEFT can do and this cannot is refused, never left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load as read_tensors
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""Settings of PEFT's that change what an adapter computes, at the values that are served."""


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """One adapter's matrices by the path of their layer; y += B A x, the scale within B."""

    layers: dict[str, tuple[Tensor, Tensor]]
    """(A: rank × in, B: out × rank), all on one device in one dtype."""
    rank: int
    """The highest of the layers' ranks."""

    @property
    def bytes(self) -> int:
        """Memory they take."""
        return sum(a.nbytes + b.nbytes for a, b in self.layers.values())


def read_lora(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    device: str,
    dtype: torch.dtype,
    sha256: str | None = None,
) -> LoraWeights:
    """The adapter in `folder` for a base whose linear layers have these (out, in) shapes.

    The weights are read once: what `sha256` is compared with is what is used. Raises ValueError
    with what does not fit, OSError where a file cannot be read.
    """
    config = LoraConfig.from_pretrained(str(folder))
    _check_plain(config)
    content = (folder / WEIGHTS).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"its weights have the SHA-256 {found[:12]}…, not {sha256[:12]}…")
    tensors = read_tensors(content)
    paths = {path for path in shapes if check_target_module_exists(config, path)}
    expected = {f"{_PREFIX}{path}.lora_{m}.weight" for path in paths for m in "AB"}
    if not expected or tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)[:3]
        raise ValueError(f"its weights are not those its adapter_config.json describes: {odd}")
    layers, highest = {}, 0
    for path in sorted(paths):
        a, b = (tensors[f"{_PREFIX}{path}.lora_{m}.weight"] for m in "AB")
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, path), config.lora_alpha
        )
        out, into = shapes[path]
        if (tuple(a.shape), tuple(b.shape)) != ((rank, into), (out, rank)):
            raise ValueError(
                f"{path}: A is {tuple(a.shape)} and B {tuple(b.shape)}; by its rank and the base "
                f"they must be {(rank, into)} and {(out, rank)}"
            )
        for matrix in (a, b):
            if not matrix.is_floating_point() or not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"{path}: its weights are not finite floating-point numbers")
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        layers[path] = (a.to(device, dtype), (b.float() * scale).to(device, dtype))
        highest = max(highest, rank)
    return LoraWeights(layers, highest)


def _check_plain(config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"it is no LoRA adapter but {type(config).__name__}")
    for name, served in _PLAIN.items():
        given = getattr(config, name, served)
        if given != served and given not in (None, [], {}):
            raise ValueError(f"{name} is {given!r} in its adapter_config.json; that is not served")
