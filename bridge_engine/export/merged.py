"""The policy as a whole model: every layer's weight with what training added to it.

In float32 it is the policy to rounding (log-probabilities within 1e-4); in bfloat16, the dtype of a
base that was loaded so, each weight is rounded to three digits, as any bfloat16 model's are.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from bridge_engine.checkpoint import publish
from bridge_engine.export.card import AdapterCard
from bridge_engine.policy import Policy


@torch.no_grad()
def export_merged(
    policy: Policy, names: tuple[str, ...], folder: Path, card: AdapterCard, dtype: torch.dtype
) -> None:
    """Writes a folder that transformers and vLLM load as it is: safetensors, config, tokenizer."""
    tensors = merged_weights(policy, names, dtype)

    def write(temporary: Path) -> None:
        policy.model.save_pretrained(temporary, state_dict=tensors)
        # transformers writes the dtype of the model in memory, not that of the tensors
        config = json.loads((temporary / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        policy.tokenizer.save_pretrained(temporary)
        card.write(temporary)

    publish(folder, write, expected_bytes=sum(t.nbytes for t in tensors.values()))


def merged_weights(
    policy: Policy, names: tuple[str, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The model's own state dict under these parameter sets, on the CPU; float32 at least, unless
    another dtype is given. Tied weights come once."""
    lora = policy.adapter_names(names)
    layers = policy.adapters.layers
    found: dict[str, Tensor] = {}
    for key, tensor in policy.adapters.base_named_parameters():
        path = key.removesuffix(".base.weight")
        weight = layers[path].merged_weight(lora) if path in layers else tensor.detach()
        name = key.replace(".base.", ".") if key.rpartition(".base.")[0] in layers else key
        kept = dtype or torch.promote_types(weight.dtype, torch.float32)
        found[name] = weight.to("cpu", kept)
    return found
