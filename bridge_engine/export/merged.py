"""The policy as a whole model: every layer's weight with what training added to it.

In float32 it is the policy to rounding (log-probabilities within 1e-4); in bfloat16, the dtype of a
base that was loaded so, each weight is rounded to three digits, as any bfloat16 model's are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bridge_engine.export.card import AdapterCard
from bridge_engine.policy import Policy
from bridge_engine.state.checkpoint import publish


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
        # where training sampled until, serving must stop: a base may not know its template's end
        generation = copy.deepcopy(policy.model.generation_config)
        generation.eos_token_id = policy.eos_ids
        generation.save_pretrained(temporary)
        policy.tokenizer.save_pretrained(temporary)
        card.write(temporary)

    publish(folder, write, expected_bytes=sum(t.nbytes for t in tensors.values()))


def merged_weights(
    policy: Policy, names: tuple[str, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The model's own state dict under these parameter sets, on the CPU; float32 at least, unless
    another dtype is given. Tied weights come once."""
    return {
        name: weight.to("cpu", dtype or weight.dtype)
        for name, weight in weights_under(policy, names)
    }


@torch.no_grad()
def weights_under(policy: Policy, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """(name in the bare model, weight under these parameter sets), one at a time, on the policy's
    device and float32 at least."""
    lora = policy.adapter_names(names)
    layers = policy.adapters.layers
    for key, tensor in policy.adapters.base_named_parameters():
        path, _, leaf = key.rpartition(".base.")
        if path in layers and leaf == "weight":
            weight = layers[path].merged_weight(lora)
        else:
            weight = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        yield (f"{path}.{leaf}" if path in layers else key), weight.detach()
