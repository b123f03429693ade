"""The policy: a frozen base model, its tokenizer, and the adapters that are trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bridge_engine.adapters import AdaptedModel
from bridge_engine.loading import load_pretrained, resolve_device
from bridge_engine.logits import check
from bridge_engine.logprobs import completion_logprobs
from bridge_engine.models import materialize_model
from bridge_engine.sequences import Padded
from bridge_engine.spec import LoraSpec, RuntimeSpec
from bridge_engine.template import end_tokens

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
        self.eos_ids = end_tokens(model, tokenizer)
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

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """The tensors of a parameter set, in a fixed order."""
        return self.adapters.parameters(name)

    @contextmanager
    def using(self, *names: str, merged: bool = False) -> Iterator[None]:
        """Within: the forward pass is that of the base with these adapters."""
        with self.adapters.using(*names, merged=merged):
            yield

    def logprobs(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) of the completion tokens under the adapters in use; padding 0.

        entropy carries no gradient.
        """
        return completion_logprobs(self.model, batch)
