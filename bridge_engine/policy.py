"""The policy: a base model, its tokenizer, and the parameter sets that are trained on it.

Two forms of the student. `lora`: student, teacher and shadow are adapters over one frozen base.
`full`: the student is the base's own weights, the shadow a second copy of the model whose layers
hold the same teacher; then `policy.module` is another module within `using("shadow", …)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bridge_engine.data.template import end_tokens
from bridge_engine.forward.adapters import AdaptedModel
from bridge_engine.forward.light import lighten
from bridge_engine.forward.logits import check
from bridge_engine.forward.logprobs import completion_logprobs
from bridge_engine.forward.sequences import MicroBatch
from bridge_engine.forward.sharing import sharing_of
from bridge_engine.models.folders import materialize_model
from bridge_engine.models.loading import load_pretrained, resolve_device, resolve_dtype
from bridge_engine.spec.train import LoraSpec, RuntimeSpec, StudentSpec

SMALL_MODEL = 20_000_000
"""Below this many parameters a second CPU thread costs more than it brings."""


class Policy:
    """Base model + parameter sets; log-probabilities of completions under any subset of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        lora: LoraSpec,
        student: StudentSpec | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """`compute_dtype`: what a full student, whose weights are float32, computes in."""
        check(model)
        lighten(model)
        self.model = model
        self.tokenizer = tokenizer
        self.student = student or StudentSpec()
        self.adapters = AdaptedModel(model, lora)
        self.device: torch.device = next(model.parameters()).device
        self.compute_dtype = compute_dtype
        self.eos_ids = end_tokens(model, tokenizer)
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = pad_id if pad_id is not None else self.eos_ids[0]
        self.copies: dict[str, AdaptedModel] = {}
        """Of a full student: the shadow's model, and the initial one where the KL term needs it."""
        self.module: Any = model
        """What a forward pass runs through; another one while a copy is in use."""
        self.sharing = sharing_of(model)
        """What sharing a prompt among its completions costs; None where that cannot be."""
        self.sharded = False
        """Has each rank but a share of a full student's weights (`distributed.sharding`)?"""

    @classmethod
    def load(
        cls, name: str, lora: LoraSpec, runtime: RuntimeSpec, student: StudentSpec | None = None
    ) -> Policy:
        """Loads the base model by its name, on the device and in the dtype the spec asks for."""
        device = resolve_device(runtime)
        dtype = resolve_dtype(runtime, device)
        full = student is not None and student.form == "full"
        weights = torch.float32 if full else dtype
        model, tokenizer = load_pretrained(materialize_model(name), weights, device, runtime)
        compute_dtype = dtype if full and dtype != torch.float32 else None
        return cls(model, tokenizer, lora, student, compute_dtype)

    @property
    def context(self) -> int:
        """Longest sequence the base model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)

    # ------------------------------------------------------------------ parameter sets

    @property
    def full(self) -> bool:
        """Is the student the base's own weights?"""
        return self.student.form == "full"

    def add(self, name: str, seed: int) -> None:
        """A new parameter set: an adapter drawn from (seed, name), or of a full student the base's
        weights. `shadow` is a copy of the student as it is, which must be there."""
        if not self.full or name == "teacher":
            self.adapters.add(name, seed)
            if name == "shadow":
                self.adapters.copy("student", "shadow")
        elif name == "student":
            for parameter in self.adapters.base_parameters():
                parameter.requires_grad_(True)
        elif name == "shadow":
            twin = self._copy()
            if self.student.shadow_dtype == "bfloat16":
                twin.cast_base(torch.bfloat16)
            for parameter in twin.base_parameters():
                parameter.requires_grad_(True)
            if self.student.shadow_offload:
                twin.move_base(torch.device("cpu"))

    def keep_initial(self) -> None:
        """Remembers the weights as they are now, as the reference of the KL term."""
        if self.full:
            for parameter in self._copy("initial").base_parameters():
                parameter.requires_grad_(False)

    def _copy(self, name: str = "shadow") -> AdaptedModel:
        """A second model with the weights of the first, which shares its adapters."""
        made = self.copies[name] = AdaptedModel.twin(self.adapters, copy.deepcopy(self.model))
        return made

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The tensors of a parameter set, in a fixed order."""
        if self.full and name == "student":
            return self.adapters.base_parameters()
        if self.full and name == "shadow":
            return self.copies["shadow"].base_parameters()
        return self.adapters.parameters(name)

    # ------------------------------------------------------------------ use

    @contextmanager
    def using(self, *names: str, merged: bool = False) -> Iterator[None]:
        """Within: the forward pass is that of the base with these parameter sets.

        No names: the initial model. A backward pass of what is computed here belongs here too.
        """
        before = self.module
        lora = self.adapter_names(names)
        chosen = self._adapted(names)
        try:
            self.module = chosen.model
            with ExitStack() as stack:
                stack.enter_context(self.on_device(*names))
                stack.enter_context(chosen.using(*lora, merged=merged, dtype=self.compute_dtype))
                if self.compute_dtype is not None:
                    stack.enter_context(torch.autocast(self.device.type, self.compute_dtype))
                yield
        finally:
            self.module = before

    def adapter_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these sets that are adapters."""
        return tuple(n for n in names if not self.full or n == "teacher")

    def model_of(self, *names: str) -> Any:
        """The module that these parameter sets run on."""
        return self._adapted(names).model

    def _adapted(self, names: tuple[str, ...]) -> AdaptedModel:
        if not self.full or "student" in names:
            return self.adapters
        return self.copies["shadow" if "shadow" in names else "initial"]

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Within: an offloaded shadow, if it is among these, is on the device. Around several
        `using` it spares moving it for each."""
        shadow = self.copies.get("shadow") if "shadow" in names else None
        if shadow is None or shadow.base_device == self.device:
            yield
            return
        shadow.move_base(self.device)
        try:
            yield
        finally:
            shadow.move_base(torch.device("cpu"))

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) of the completion tokens under the sets in use; padding 0.

        entropy carries no gradient.
        """
        if self.sharded:  # a method of the module, so that its weights are gathered for it
            found: tuple[Tensor, Tensor] = self.module.completion_logprobs(batch)
            return found
        return completion_logprobs(self.module, batch)
