"""The policy: a frozen base model, its tokenizer, and the adapters that are trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.adapters import AdaptedModel
from bridge_engine.errors import EngineError
from bridge_engine.logits import check, head_logits
from bridge_engine.models import materialize_model
from bridge_engine.sequences import Padded
from bridge_engine.spec import LoraSpec, RuntimeSpec

SMALL_MODEL = 20_000_000
"""Below this many parameters a second CPU thread costs more than it brings."""


class Policy:
    """Base model + named adapters; log-probabilities of completions under any subset of them."""

    def __init__(self, model: Any, tokenizer: Any, lora: LoraSpec) -> None:
        check(model)
        self.model = model
        self.tokenizer = tokenizer
        self.adapters = AdaptedModel(model, lora)
        self.device: torch.device = next(model.parameters()).device
        self.eos_ids = _eos_ids(model, tokenizer)
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = pad_id if pad_id is not None else self.eos_ids[0]

    @classmethod
    def load(cls, name: str, lora: LoraSpec, runtime: RuntimeSpec) -> Policy:
        """Loads the base model by its name, on the device and in the dtype the spec asks for."""
        device = resolve_device(runtime)
        dtype = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        }[runtime.dtype]
        folder = materialize_model(name)
        return cls(*load_pretrained(folder, dtype, device), lora)

    @property
    def context(self) -> int:
        """Longest sequence the base model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @contextmanager
    def using(self, *names: str, merged: bool = False) -> Iterator[None]:
        """Within: the forward pass is that of the base with these adapters."""
        with self.adapters.using(*names, merged=merged):
            yield

    def logprobs(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) of the completion tokens under the adapters in use; padding 0.

        Logits are computed where a completion token is predicted and nowhere else: neither for
        prompts nor for padding. entropy carries no gradient.
        """
        hidden_BLD = self.model.base_model(
            input_ids=batch.tokens_BL, use_cache=False
        ).last_hidden_state
        keep_BT = batch.mask_BT.bool()
        positions_BT = batch.positions_BT
        rows_BT = torch.arange(len(positions_BT), device=positions_BT.device).unsqueeze(1)
        hidden_ND = hidden_BLD[rows_BT, positions_BT][keep_BT]
        targets_N = batch.tokens_BL[
            rows_BT, (positions_BT + 1).clamp(max=batch.tokens_BL.shape[1] - 1)
        ][keep_BT]
        logits_NV = head_logits(self.model, hidden_ND)
        at_least_float32 = torch.promote_types(logits_NV.dtype, torch.float32)
        logprobs_NV = torch.log_softmax(logits_NV.to(at_least_float32), dim=-1)
        logprobs_N = logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
        with torch.no_grad():
            entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        empty_BT = logprobs_N.new_zeros(keep_BT.shape)
        return (
            empty_BT.masked_scatter(keep_BT, logprobs_N),
            empty_BT.masked_scatter(keep_BT, entropy_N),
        )


def load_pretrained(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder: safetensors only, and no code from it is ever run."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the model in {folder.name!r} cannot be loaded: {error}",
            code="unloadable_model",
            param="model",
        ) from error
    return model.to(device), tokenizer


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


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion, the tokenizer's own first."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    configured = model.generation_config.eos_token_id
    for token in configured if isinstance(configured, list) else [configured]:
        if token is not None and token not in ids:
            ids.append(token)
    if not ids:
        raise EngineError(
            "the model's tokenizer has no end-of-sequence token", code="no_eos", param="model"
        )
    return ids
