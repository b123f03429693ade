"""Loading a base model: on which device, in which dtype, with which attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from bridge_engine.errors import EngineError
from bridge_engine.spec import RuntimeSpec


def load_pretrained(
    folder: Path, dtype: torch.dtype, device: torch.device, runtime: RuntimeSpec | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder: safetensors only, and no code from it is ever run.

    No dropout anywhere: the policy that learns must be the policy that sampled.
    """
    runtime = runtime or RuntimeSpec()
    if runtime.attention == "flash_attention_2":
        _check_flash_attention(device)
    attention = {} if runtime.attention == "auto" else {"attn_implementation": runtime.attention}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name, value in config.to_dict().items():
            if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            **attention,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the model in {folder.name!r} cannot be loaded: {error}",
            code="unloadable_model",
            param="model",
        ) from error
    if runtime.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def _check_flash_attention(device: torch.device) -> None:
    if device.type != "cuda" or not is_flash_attn_2_available():
        raise EngineError(
            "runtime.attention is flash_attention_2, which needs a CUDA device and the package "
            "flash-attn; use auto or sdpa",
            code="no_flash_attention",
            param="runtime.attention",
        )


def resolve_device(runtime: RuntimeSpec) -> torch.device:
    """The device the spec asks for."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "runtime.device is cuda, but this machine has no CUDA device; use auto or cpu",
            code="no_gpu",
            param="runtime.device",
        )
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(runtime.device)


def resolve_dtype(runtime: RuntimeSpec, device: torch.device) -> torch.dtype:
    """The dtype the spec asks for; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
    }[runtime.dtype]
