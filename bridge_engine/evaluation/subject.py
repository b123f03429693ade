"""Who is asked: a base model, with a trained adapter on it or without, or a full student."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.checks import read_card
from bridge_engine.export.adapter import WEIGHTS
from bridge_engine.models.loading import load_pretrained, resolve_device, resolve_dtype
from bridge_engine.policy import Policy
from bridge_engine.spec.train import LoraSpec, RuntimeSpec
from bridge_engine.state.checkpoint import is_whole
from bridge_engine.state.tensor_files import load_tensors

NAME = "policy"
"""The parameter set that an adapter becomes."""
BARE = LoraSpec(rank=1)
"""Of a base model alone, which no adapter is added to."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's own file; what lacks it is no adapter."""


@dataclass(frozen=True)
class Subject:
    """A policy, and the parameter sets of it that answer."""

    policy: Policy
    names: tuple[str, ...]


def load_subject(base: str, folder: Path | None, runtime: RuntimeSpec) -> Subject:
    """The base model with the PEFT adapter in `folder`; None: the base alone. A full student's
    folder holds a whole model, which takes the base's place.

    Raises EngineError (`adapter_missing`, `adapter_damaged`, `wrong_base`, `adapter_does_not_fit`).
    """
    if folder is None:
        return Subject(Policy.load(base, BARE, runtime), ())
    card = read_card(folder)
    if not is_whole(folder):
        raise _error("adapter_damaged", f"the adapter in {folder} is not what its manifest says")
    if card.base_model != base:
        raise _error("wrong_base", f"the adapter was trained on {card.base_model}, not on {base}")
    if not (folder / ADAPTER_CONFIG).exists():
        device = resolve_device(runtime)
        whole = load_pretrained(folder, resolve_dtype(runtime, device), device, runtime)
        return Subject(Policy(*whole, BARE), ())
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    lora = LoraSpec.model_construct(  # what is exported may have a rank that no training has
        rank=config["r"], alpha=config["lora_alpha"], target_modules=config["target_modules"]
    )
    policy = Policy.load(base, lora, runtime)
    policy.adapters.add(NAME, 0)
    _take(policy, load_tensors(folder / WEIGHTS))
    return Subject(policy, (NAME,))


@torch.no_grad()
def _take(policy: Policy, tensors: dict[str, Tensor]) -> None:
    wanted: dict[str, Any] = {
        f"base_model.model.{path}.lora_{letter}.weight": side[NAME]
        for path, layer in policy.adapters.layers.items()
        for letter, side in (("A", layer.A), ("B", layer.B))
    }
    fits = wanted.keys() == tensors.keys() and all(
        wanted[key].shape == tensors[key].shape for key in wanted
    )
    if not fits:
        raise _error("adapter_does_not_fit", "the adapter's layers are not those of the base model")
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])


def _error(code: str, message: str) -> EngineError:
    return EngineError(message, code=code, param="adapter")
