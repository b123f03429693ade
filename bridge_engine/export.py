"""The trained policy as one standard PEFT adapter.

Student and teacher act on the same layers with the same scale, so their sum is itself an adapter,
exactly: A = [A_θ; A_w], B = [B_θ B_w], of rank r_θ + r_w. `lora_alpha` grows with the rank so that
alpha / rank, and with it the policy, stays what it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from bridge_engine.adapters import AdaptedModel
from bridge_engine.checkpoint import publish, save_tensors, sha256_of

WEIGHTS = "adapter_model.safetensors"
CARD = "bridge.json"


@dataclass(frozen=True)
class AdapterCard:
    """What is worth knowing of an adapter beside its weights; lies beside them as `bridge.json`."""

    base_model: str
    method: str
    step: int
    rank: int
    template: dict[str, Any]
    """How a problem becomes a prompt (`TemplateSpec`, with `auto` decided)."""
    max_new_tokens: int
    accuracy: float | None = None
    """Held-out accuracy at this step, in 0…1, where it was measured."""


def export_adapter(
    adapters: AdaptedModel, names: tuple[str, ...], folder: Path, card: AdapterCard
) -> str:
    """Writes the sum of the named adapters; returns the SHA-256 of the weights."""
    tensors: dict[str, Tensor] = {}
    size = 0
    for path, layer in adapters.layers.items():
        a, b = layer.stacked(names)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        size += 4 * (a.numel() + b.numel())
    config = LoraConfig(
        base_model_name_or_path=card.base_model,
        task_type="CAUSAL_LM",
        r=card.rank,
        lora_alpha=_alpha(adapters, card.rank),
        target_modules=sorted({path.rpartition(".")[2] for path in adapters.layers}),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )

    def write(temporary: Path) -> None:
        save_tensors(temporary / WEIGHTS, tensors)
        config.save_pretrained(str(temporary))
        (temporary / CARD).write_text(json.dumps(asdict(card), indent=1))

    with torch.no_grad():
        publish(folder, write, expected_bytes=size)
    return sha256_of(folder / WEIGHTS)


def exported_rank(adapters: AdaptedModel, names: tuple[str, ...]) -> int:
    """Rank of the sum of the named adapters."""
    return adapters.lora.rank * len(names)


def _alpha(adapters: AdaptedModel, rank: int) -> float:
    alpha = adapters.lora.alpha * rank / adapters.lora.rank
    return int(alpha) if alpha == int(alpha) else alpha
