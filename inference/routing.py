"""Many adapters in one forward pass: each row of a batch goes through its own low-rank product.

Every linear layer of the base is wrapped once, when the base is loaded. Which adapter a row has is
said before each pass (`Routing.using`); a row without one gets nothing added, not even a zero. The
base's weights are never touched, so no adapter can leave anything behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.lora import LoraWeights

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Plan:
    """Who gets what in one pass. `slots_N` and `rows_N` are None where all rows share `pairs`."""

    rows: int
    positions: int
    """Tokens of each row; the head is given one of each."""
    pairs: dict[str, Pair]
    """By layer: A (rank × in) and B (out × rank); stacked, slots first, where slots_N is given."""
    slots_N: Tensor | None = None
    """The slot of each row that has an adapter."""
    rows_N: Tensor | None = None
    """Those rows; None where all have one."""


class Routing:
    """The adapters of a base's rows, as its wrapped layers look them up."""

    def __init__(self, model: Any) -> None:
        """Wraps every linear layer of the model, in place."""
        self.plan: _Plan | None = None
        self.shapes: dict[str, tuple[int, int]] = {}
        """(out, in) of each layer that an adapter may be on, by its path in the bare model."""
        parameter = next(model.parameters())
        linears = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
        for path, linear in linears:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, RoutedLinear(linear, self, path))
            self.shapes[path] = (linear.out_features, linear.in_features)
        self._bank = _Bank(parameter.device, parameter.dtype)

    @contextmanager
    def using(self, adapters: Sequence[LoraWeights | None], positions: int) -> Iterator[None]:
        """Within: row i of a pass of len(adapters) × positions tokens goes through adapters[i]."""
        self.plan = self._planned(adapters, positions)
        try:
            yield
        finally:
            self.plan = None

    def _planned(self, adapters: Sequence[LoraWeights | None], positions: int) -> _Plan | None:
        first = adapters[0]
        if all(adapter is first for adapter in adapters):
            return None if first is None else _Plan(len(adapters), positions, first.layers)
        slots = self._bank.slots([a for a in adapters if a is not None])
        rows = [row for row, adapter in enumerate(adapters) if adapter is not None]
        device = self._bank.device
        return _Plan(
            len(adapters),
            positions,
            self._bank.pairs,
            torch.tensor(slots, device=device),
            torch.tensor(rows, device=device) if len(rows) < len(adapters) else None,
        )


class RoutedLinear(nn.Module):
    """A linear layer whose rows may each have an adapter."""

    def __init__(self, base: nn.Linear, routing: Routing, path: str) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self._routing = [routing]  # in a list: it is no part of the model

    @property
    def weight(self) -> Tensor:
        """The base's own: some models look at it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's own."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """y = W x, and B A x of its row's adapter for the rows that have one."""
        y: Tensor = self.base(x)
        plan = self._routing[0].plan
        if plan is None or (pair := plan.pairs.get(self.path)) is None:
            return y
        a, b = pair
        flat_TI, flat_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if len(flat_TI) not in (plan.rows * plan.positions, plan.rows):
            raise ValueError(
                f"{self.path} was given {len(flat_TI)} tokens of a pass of {plan.rows} × "
                f"{plan.positions}: in this model its rows cannot be told apart"
            )
        if plan.slots_N is None:
            return torch.addmm(flat_TO, F.linear(flat_TI, a), b.t()).view_as(y)
        x_NLI = flat_TI.view(plan.rows, -1, x.shape[-1])
        y_NLO = flat_TO.view(plan.rows, -1, y.shape[-1])
        a_NIr, b_NrO = a[plan.slots_N].mT, b[plan.slots_N].mT
        if plan.rows_N is None:
            return torch.baddbmm(y_NLO, torch.bmm(x_NLI, a_NIr), b_NrO).view_as(y)
        added_NLO = torch.bmm(torch.bmm(x_NLI[plan.rows_N], a_NIr), b_NrO)
        return y_NLO.index_add(0, plan.rows_N, added_NLO).view_as(y)


class _Bank:
    """The adapters of the latest batches, stacked, so that rows find theirs by its slot.

    Each is copied in when a batch first needs it and stays until another needs its place; a slot is
    known by the adapter itself, not by its name, so it can never be taken for another.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.pairs: dict[str, Pair] = {}
        self._slots: weakref.WeakKeyDictionary[LoraWeights, int] = weakref.WeakKeyDictionary()
        self._size = self._rank = 0

    def slots(self, adapters: Sequence[LoraWeights]) -> list[int]:
        """The slot of each of these adapters, which may come several times."""
        wanted = dict.fromkeys(adapters)
        missing = [adapter for adapter in wanted if adapter not in self._slots]
        if missing:
            rank = max(adapter.rank for adapter in wanted)
            if len(wanted) > self._size or rank > self._rank:
                self._rebuild(max(len(wanted), 2 * self._size), max(rank, self._rank))
                missing = list(wanted)
            used = {self._slots[a] for a in wanted if a in self._slots}
            free = (slot for slot in range(self._size) if slot not in used)
            for adapter, slot in zip(missing, free, strict=False):
                self._put(adapter, slot)
        return [self._slots[adapter] for adapter in adapters]

    def _rebuild(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank
        self._slots.clear()
        self.pairs = {}

    def _put(self, adapter: LoraWeights, slot: int) -> None:
        for other in [other for other, taken in self._slots.items() if taken == slot]:
            del self._slots[other]
        for path, (a, b) in adapter.layers.items():
            if path not in self.pairs:
                self.pairs[path] = (
                    self._empty(self._size, self._rank, a.shape[1]),
                    self._empty(self._size, b.shape[0], self._rank),
                )
        for path, (stacked_a, stacked_b) in self.pairs.items():
            stacked_a[slot].zero_()
            stacked_b[slot].zero_()
            if path in adapter.layers:
                a, b = adapter.layers[path]
                stacked_a[slot, : len(a)] = a
                stacked_b[slot, :, : b.shape[1]] = b
        self._slots[adapter] = slot

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)
