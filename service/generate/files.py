"""What lies in an adapter's folder, compared with the registry before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_engine.state.tensor_header import tensor_header
from service.adapters.files import WEIGHTS
from service.store import AdapterRow

CARD = "bridge.json"
DTYPES = {"F32", "F16", "BF16"}
"""Of weights, as safetensors calls them."""


def check_files(adapter: AdapterRow, folder: Path) -> None:
    """Raises ValueError where what lies beside the weights contradicts them or the registry."""
    if not adapter.is_model:
        _check_config(adapter, folder)
    trained_on = card_of(folder).get("base_model", adapter.base_model)
    if trained_on != adapter.base_model:
        raise ValueError(
            f"it was trained on {trained_on!r}, and was registered for {adapter.base_model!r}"
        )


def card_of(folder: Path) -> Mapping[str, Any]:
    """The adapter's bridge.json; empty where there is none that can be read."""
    try:
        return read_card((folder / CARD).read_bytes())
    except OSError:
        return {}


def read_card(content: bytes) -> Mapping[str, Any]:
    """What a bridge.json says; empty where it cannot be read."""
    try:
        card = json.loads(content)
    except ValueError:
        return {}
    return card if isinstance(card, dict) else {}


def _check_config(adapter: AdapterRow, folder: Path) -> None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, rank, targets = config["peft_type"], config["r"], config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its adapter_config.json cannot be read: {error!r}") from None
    if kind != "LORA" or not targets:
        raise ValueError(f"its adapter_config.json says {kind} on {targets}, not LoRA on layers")
    if rank != adapter.rank:
        raise ValueError(
            f"it has rank {rank} by its adapter_config.json, and was registered with {adapter.rank}"
        )
    tensors = tensor_header(folder / WEIGHTS)
    if other := {str(entry["dtype"]) for entry in tensors.values()} - DTYPES:
        raise ValueError(f"its weights are of dtype {', '.join(sorted(other))}")
    if isinstance(targets, list):  # a text is a pattern, for PEFT to match
        layers = {name.rpartition(".lora_")[0] for name in tensors}
        unnamed = [
            layer for layer in layers if not any(f".{layer}".endswith(f".{t}") for t in targets)
        ]
        if unnamed:
            raise ValueError(
                "its adapter_config.json does not fit its weights: no target module is "
                f"{min(unnamed)}, of which it has some"
            )
