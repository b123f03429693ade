"""Whole weights for a running vLLM server to reload.

vLLM's CPU build packs the output head when it starts; a reload renews the packed head where the
head is a weight of its own, and may leave the old one in place where it is the embedding (tied;
which kernel packs it decides). So the head is always written by name: a server of a tied model
passes over it, and a server of an untied copy of that model, which

    python -m bridge_engine.rollout.serving_weights MODEL FOLDER

makes, takes it. A GPU server, and any student that leaves the embedding alone (LoRA), need no copy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from bridge_engine.export.merged import merged_weights
from bridge_engine.models.folders import materialize_model
from bridge_engine.models.loading import load_pretrained
from bridge_engine.policy import Policy
from bridge_engine.state.checkpoint import publish
from bridge_engine.state.tensor_files import save_tensors


def write_serving_weights(
    policy: Policy, names: tuple[str, ...], folder: Path, dtype: torch.dtype
) -> None:
    """Writes the policy under these parameter sets, merged and in `dtype`, as safetensors."""
    tensors = with_head(policy.model, merged_weights(policy, names, dtype))
    publish(
        folder,
        lambda temporary: save_tensors(temporary / "model.safetensors", tensors),
        expected_bytes=sum(t.nbytes for t in tensors.values()),
    )


def with_head(model: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, and the output head's also where it is the embedding."""
    embedding = _path_of(model, model.get_input_embeddings())  # type: ignore[operator]
    head = _path_of(model, model.get_output_embeddings())  # type: ignore[operator]
    if head in tensors:
        return tensors
    return tensors | {head: tensors[embedding].clone()}


def _path_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(f"{path}.weight" for path, module in model.named_modules() if module is wanted)


def write_untied(name: str, folder: Path) -> None:
    """A copy of the model called `name` whose head is a weight of its own, equal to the embedding:
    the same function, in the dtype it is stored in, for vLLM to serve."""
    source = materialize_model(name)
    stored = AutoConfig.from_pretrained(source).dtype or torch.float32
    model, tokenizer = load_pretrained(source, stored, torch.device("cpu"))
    tensors = with_head(model, dict(model.named_parameters()))
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=write_untied.__doc__)
    parser.add_argument("model", help="a model's name, as in a spec")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_untied(options.model, options.folder)
