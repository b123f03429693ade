"""Loading a base model: on which device, in which dtype, with which attention."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bridge_engine.errors import EngineError
from bridge_engine.forward import recomputation
from bridge_engine.spec.train import RuntimeSpec


def load_pretrained(
    folder: Path, dtype: torch.dtype, device: torch.device, runtime: RuntimeSpec | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder: safetensors only, and no code from it is ever run.

    Of `runtime` (default: the spec's defaults) counts how to compute: attention, gradient
    checkpointing, and whether the model can do without padding. Dropout is off, whatever the
    folder says. EngineError names the field that cannot be had.
    """
    runtime = runtime or RuntimeSpec()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _turn_off_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_attention(runtime, device, config),
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the model in {folder.name!r} cannot be loaded: {error}",
            code="unloadable_model",
            param="model",
        ) from error
    model = model.to(device)
    if runtime.gradient_checkpointing:
        recomputation.enable(model)
    if runtime.padding_free:
        check_padding_free(model)
    return model, tokenizer


def _turn_off_dropout(config: Any) -> None:
    """A policy is one distribution: the one that samples must be the one that is trained."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


def _attention(runtime: RuntimeSpec, device: torch.device, config: Any) -> str | None:
    """transformers' name of the attention to use; None leaves it to choose, which takes torch's
    scaled dot-product attention (SDPA) for every model that has it."""
    wanted = runtime.attention
    caps = bool(getattr(config, "attn_logit_softcapping", None))  # Gemma 2; SDPA cannot
    if wanted == "auto":
        return "eager" if caps else None
    if wanted == "sdpa" and caps:
        raise _no_attention("sdpa leaves out the cap that this model puts on attention scores")
    if wanted == "flash_attention_2":
        if device.type != "cuda":
            raise _no_attention("flash attention runs on a GPU, and this job computes on the CPU")
        if find_spec("flash_attn") is None:
            raise _no_attention(
                "the package flash-attn is not installed here (pip install flash-attn)"
            )
    return wanted


def _no_attention(why: str) -> EngineError:
    return EngineError(
        f"{why}; or set runtime.attention to auto",
        code="attention_unavailable",
        param="runtime.attention",
    )


@torch.no_grad()
def check_padding_free(model: Any) -> None:
    """EngineError (`no_padding_free`) unless sequences in one row leave each other alone: the
    second one's hidden states must not depend, but for rounding, on what the first one says."""
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    hidden = []
    for first in ([1, 2, 3], [9, 8, 7]):
        tokens = torch.tensor([[*first, 4, 5, 6, 4]], device=device) % size
        output = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        hidden.append(output.last_hidden_state[:, 3:].float())
    one, other = hidden
    if not (one - other).norm() <= 1e-2 * one.norm():
        raise EngineError(
            "in this model sequences that share a row see one another; set runtime.padding_free "
            "to false",
            code="no_padding_free",
            param="runtime.padding_free",
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
