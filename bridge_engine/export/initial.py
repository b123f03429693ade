"""The weights training started from, read again from the base's folder, one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bridge_engine.models.loading import load_pretrained


class InitialWeights:
    """A base model's weights by their names in the model; nothing is kept in memory.

    Where a file calls a weight by another name than transformers does, the whole model is loaded
    for it, once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files(folder)
        self._loaded: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The weight as it lies there, on the CPU; KeyError if the model has none of that name."""
        if (file := self._files.get(name)) is None:
            return self._by_transformers()[name]
        with safe_open(file, framework="pt") as tensors:
            weight: Tensor = tensors.get_tensor(name)
        return weight

    def _by_transformers(self) -> dict[str, Tensor]:
        if self._loaded is None:
            model, _ = load_pretrained(self.folder, torch.float32, torch.device("cpu"))
            self._loaded = {name: p.detach() for name, p in model.named_parameters()}
        return self._loaded


def _files(folder: Path) -> dict[str, Path]:
    """In which file each weight lies, from the index or from the files' headers."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / shard for name, shard in shards.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found
