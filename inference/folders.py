"""Folders of weights, looked at before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from inference.errors import InferenceError
from inference.lora import WEIGHTS


def checked_base(path: Path, base_model: str | None) -> str:
    """The adapter's base model; checks the folder and, where the folder names it, the base."""
    if not (path / "adapter_config.json").is_file() or not (path / WEIGHTS).is_file():
        raise InferenceError(
            f"No adapter lies at {path}: adapter_config.json and adapter_model.safetensors are "
            "needed (weights in any other format are refused).",
            param="lora_path",
        )
    card = path / "bridge.json"
    trained_on = None
    try:
        if card.is_file():
            trained_on = json.loads(card.read_text(encoding="utf-8")).get("base_model")
    except (ValueError, AttributeError) as error:
        raise InferenceError(f"{card} is not readable: {error}", param="lora_path") from error
    if trained_on and base_model and trained_on != base_model:
        raise InferenceError(
            f"The adapter at {path} was trained on {trained_on!r}, not on {base_model!r}.",
            param="base_model",
        )
    name = base_model or trained_on
    if not name:
        raise InferenceError(
            "The adapter's folder does not say which base model it belongs to: name base_model.",
            param="base_model",
        )
    return str(name)


def bytes_of(path: Path, dtype: torch.dtype) -> int:
    """Memory that a folder's weights take in this dtype, from the files' headers."""
    size = torch.empty((), dtype=dtype).element_size()
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                count = 1
                for side in tensors.get_slice(key).get_shape():
                    count *= side
                total += count * size
    return total


def check_model(path: Path) -> None:
    """Raises InferenceError unless a whole model lies at `path`."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise InferenceError(
            f"No model lies at {path}: config.json and *.safetensors are needed.", param="path"
        )
