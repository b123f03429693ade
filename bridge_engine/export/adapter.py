"""The trained policy as one standard PEFT adapter.

Student and teacher act on the same layers with the same scale, so their sum is itself an adapter,
exactly: A = [A_θ; A_w], B = [B_θ B_w], of rank r_θ + r_w. `lora_alpha` grows with the rank so that
alpha / rank, and with it the policy, stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from bridge_engine.export.card import AdapterCard
from bridge_engine.forward.adapters import AdaptedModel
from bridge_engine.state.checkpoint import publish, sha256_of
from bridge_engine.state.tensor_files import save_tensors

WEIGHTS = "adapter_model.safetensors"


def export_adapter(
    adapters: AdaptedModel, names: tuple[str, ...], folder: Path, card: AdapterCard
) -> str:
    """Writes the sum of the named adapters; returns the SHA-256 of the weights."""
    pairs = {path: layer.stacked(names) for path, layer in adapters.layers.items()}
    with torch.no_grad():
        return write_peft(pairs, _alpha(adapters, card.rank), folder, card)


def write_peft(
    pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float, folder: Path, card: AdapterCard
) -> str:
    """Writes (A, B) of each layer as a PEFT adapter of scale alpha / card.rank; returns the SHA-256
    of the weights."""
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    config = LoraConfig(
        base_model_name_or_path=card.base_model,
        task_type="CAUSAL_LM",
        r=card.rank,
        lora_alpha=alpha,
        target_modules=sorted({path.rpartition(".")[2] for path in pairs}),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )

    def write(temporary: Path) -> None:
        save_tensors(temporary / WEIGHTS, tensors)
        config.save_pretrained(str(temporary))
        card.write(temporary)

    publish(folder, write, expected_bytes=sum(t.nbytes for t in tensors.values()))
    return sha256_of(folder / WEIGHTS)


def exported_rank(adapters: AdaptedModel, names: tuple[str, ...]) -> int:
    """Rank of the sum of the named adapters."""
    return adapters.lora.rank * len(names)


def _alpha(adapters: AdaptedModel, rank: int) -> float:
    alpha = adapters.lora.alpha * rank / adapters.lora.rank
    return int(alpha) if alpha == int(alpha) else alpha
