"""Several LoRA adapters over one frozen linear layer, any subset of them active at once.

PEFT's own layers would do, one after another; here the active adapters are concatenated into one
low-rank product (rank r_θ + r_w), which halves the kernels of a step, and the merged form used for
sampling is a tensor beside the weight and never written into it, so that switching is exact. The
parametrisation is PEFT's (y += alpha/rank · B A x); `bridge_engine.export` writes PEFT's format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bridge_engine.errors import EngineError
from bridge_engine.forward.products import linear
from bridge_engine.seeding import generator
from bridge_engine.spec.errors import did_you_mean
from bridge_engine.spec.train import LoraSpec


class LoraLinear(nn.Module):
    """A frozen linear layer W (out × in) with named adapters A (rank × in) and B (out × rank)."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.active: tuple[str, ...] = ()
        self.merging: torch.dtype | None = None
        """While the adapters are merged: the dtype of W + ΔW."""
        self.merged: Tensor | None = None
        """W + ΔW, once it has been multiplied with."""

    def add(self, name: str, rank: int, rng: torch.Generator) -> None:
        """A new adapter that changes nothing yet: A uniform as PEFT draws it, B zero. float32."""
        out_features, in_features = self.base.weight.shape
        device = self.base.weight.device
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform_(a=√5), PEFT's default
        a = (torch.rand(rank, in_features, generator=rng) * 2 - 1) * bound
        self.A[name] = nn.Parameter(a.to(device))
        self.B[name] = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The named adapters as one: A (Σrank × in), B (out × Σrank)."""
        if len(names) == 1:
            return self.A[names[0]], self.B[names[0]]
        return torch.cat([self.A[n] for n in names]), torch.cat([self.B[n] for n in names], dim=1)

    def delta(self, names: Sequence[str]) -> Tensor:
        """What the named adapters add to W, float32."""
        a, b = self.stacked(names)
        return (b @ a).mul_(self.scale)

    @torch.no_grad()
    def weight_in_use(self) -> Tensor:
        """W + ΔW of what is in use, in the dtype of W or the one asked for: exact to rounding in
        float32, to about three digits in bfloat16."""
        dtype = self.merging or self.base.weight.dtype
        if not self.active:
            return self.base.weight.detach().to(dtype)
        return self.merged_weight(self.active).to(dtype)

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """W + ΔW, float32 at least."""
        weight = self.base.weight
        if not names:
            return weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.delta(names).add_(weight)  # in place: new memory costs more than the sum

    def forward(self, x: Tensor) -> Tensor:
        if self.merging is not None:
            if self.merged is None:
                self.merged = self.weight_in_use()
            return linear(x, self.merged, self.base.bias)
        adapter = self.stacked(self.active) if self.active else None
        return linear(x, self.base.weight, self.base.bias, adapter, self.scale)


class AdaptedModel:
    """A frozen transformers model whose linear layers carry named adapters."""

    def __init__(self, model: nn.Module, lora: LoraSpec) -> None:
        self.model = model.requires_grad_(False).eval()
        self.lora = lora
        self.names: list[str] = []
        self.layers: dict[str, LoraLinear] = {}
        for path, base in _target_layers(model, lora.target_modules):
            parent_path, _, leaf = path.rpartition(".")
            layer = LoraLinear(base, lora.alpha / lora.rank)
            setattr(model.get_submodule(parent_path), leaf, layer)
            self.layers[path] = layer
        if not self.layers:
            raise EngineError(
                "the model has no linear layer that an adapter could be put on",
                code="no_target_layers",
                param="lora.target_modules",
            )

    @classmethod
    def twin(cls, original: AdaptedModel, model: nn.Module) -> AdaptedModel:
        """A deep copy of an adapted model's module as one itself: base weights of its own, and the
        very adapters of the original, those that are still to come included."""
        made = cls.__new__(cls)
        made.model, made.lora, made.names = model, original.lora, original.names
        made.layers = {}
        for path, layer in original.layers.items():
            copied = model.get_submodule(path)
            assert isinstance(copied, LoraLinear)
            copied.A, copied.B = layer.A, layer.B
            made.layers[path] = copied
        return made

    def base_parameters(self) -> list[nn.Parameter]:
        """The base's own weights, in the model's order; adapters are none of them."""
        return [parameter for _, parameter in self.base_named_parameters()]

    def base_named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with their paths in the adapted model."""
        return [(n, p) for n, p in self.model.named_parameters() if not _is_adapter(n)]

    @property
    def base_device(self) -> torch.device:
        """Where the base's weights are."""
        return self.base_parameters()[0].device

    def move_base(self, device: torch.device) -> None:
        """Moves the base's weights and their gradients; adapters stay where they are."""
        for parameter in self.base_parameters():
            parameter.data = parameter.data.to(device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)

    def cast_base(self, dtype: torch.dtype) -> None:
        """Keeps the base's weights in another dtype."""
        for parameter in self.base_parameters():
            parameter.data = parameter.data.to(dtype)

    def add(self, name: str, seed: int) -> None:
        """A new adapter in every layer, drawn from (seed, name)."""
        rng = generator(seed, f"init/{name}")
        for layer in self.layers.values():
            layer.add(name, self.lora.rank, rng)
        self.names.append(name)

    def copy(self, source: str, target: str) -> None:
        """Makes `target` equal to `source`, to the last bit."""
        with torch.no_grad():
            for old, new in zip(self.parameters(source), self.parameters(target), strict=True):
                new.copy_(old)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's tensors in a fixed order: A and B of each layer."""
        return [p for layer in self.layers.values() for p in (layer.A[name], layer.B[name])]

    @contextmanager
    def using(
        self, *names: str, merged: bool = False, dtype: torch.dtype | None = None
    ) -> Iterator[None]:
        """Within: the forward pass is that of the base with these adapters (none: the bare base).

        `merged` runs on W + ΔW, in `dtype` if one is given: no gradients, no extra kernels. A layer
        computes it when it is first needed, and keeps it.
        """
        try:
            for layer in self.layers.values():
                layer.active = names
                if merged and (names or dtype is not None):
                    layer.merging = dtype or layer.base.weight.dtype
            yield
        finally:
            for layer in self.layers.values():
                layer.active, layer.merging, layer.merged = (), None, None


def _is_adapter(path: str) -> bool:
    """Does a parameter's path end in `A.<name>` or `B.<name>` of a LoraLinear?"""
    parts = path.split(".")
    return len(parts) > 1 and parts[-2] in ("A", "B")


def _target_layers(model: nn.Module, targets: list[str] | str) -> list[tuple[str, nn.Linear]]:
    """The linear layers that get adapters, in the model's own order; never the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if targets == "all-linear":
        return linears
    known = sorted({path.rpartition(".")[2] for path, _ in linears})
    for target in targets:
        if target not in known:
            raise EngineError(
                f"the model has no linear layer {target!r}{did_you_mean(target, known)} "
                f"It has: {', '.join(known)}.",
                code="unknown_target_module",
                param="lora.target_modules",
            )
    return [(path, module) for path, module in linears if path.rpartition(".")[2] in targets]
