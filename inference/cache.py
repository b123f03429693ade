"""Keys and values of rows that come and go: each row has its own length.

Row i's tokens lie at the places 0 … length−1 of one buffer a layer. A new row is written behind the
others; when one leaves, the last takes its place. What lies behind a row's length is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_BLOCK = 64
"""Buffers grow by so many tokens, or by doubling their rows."""


class RowsCache:
    """The key-value cache of one base's batch. `cache` is what a model's forward pass takes."""

    def __init__(self, model: Any) -> None:
        self.cache = DynamicCache(config=model.config)
        self.lengths: list[int] = []
        """Tokens of each row that are in the cache."""
        self.device = next(model.parameters()).device
        self.positions_R = torch.zeros(0, dtype=torch.long, device=self.device)
        """Of the pass that is running: where each row's new token goes."""
        self.order_R = self.positions_R
        self._layers: list[_RowsLayer] = []

    def append(self, filled: DynamicCache, row: int, length: int, copies: int = 1) -> None:
        """Adds a row, or several alike, with the first `length` tokens of a filled cache's row."""
        if not self._layers:
            self._layers = [_RowsLayer(self, layer) for layer in filled.layers]
            self.cache.layers = self._layers
        for layer, source in zip(self._layers, filled.layers, strict=True):
            for _ in range(copies):
                layer.append(source.keys[row, :, :length], source.values[row, :, :length])
        self.lengths += [length] * copies

    @property
    def whole(self) -> bool:
        """Does every layer hold every row? Not if adding one broke off."""
        return all(layer.rows == len(self.lengths) for layer in self._layers)

    def remove(self, row: int) -> None:
        """Row `row` leaves; the last row is now in its place."""
        last = len(self.lengths) - 1
        for layer in self._layers:
            layer.remove(row, last)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def step_mask(self) -> Tensor:
        """Gets ready for one token more of every row; the mask of that pass, R × 1 × 1 × L."""
        self.positions_R = torch.tensor(self.lengths, device=self.device)
        self.order_R = torch.arange(len(self.lengths), device=self.device)
        longest = max(self.lengths) + 1
        for layer in self._layers:
            layer.reserve(len(self.lengths), longest)
            layer.seen = longest
        places_L = torch.arange(longest, device=self.device)
        hidden_RL = places_L > self.positions_R[:, None]
        mask_RL = torch.zeros(hidden_RL.shape, dtype=self._layers[0].dtype, device=self.device)
        return mask_RL.masked_fill_(hidden_RL, -torch.inf)[:, None, None]

    def grown(self) -> None:
        """The pass is over: every row is one token longer."""
        self.lengths = [length + 1 for length in self.lengths]

    def clear(self) -> None:
        """All rows leave, and their memory is given back."""
        self.lengths, self._layers = [], []
        self.cache.layers = []


class _RowsLayer(DynamicLayer):  # type: ignore[misc]  # untyped library
    """One layer's share: buffers of rows × heads × places × D."""

    def __init__(self, owner: RowsCache, like: Any) -> None:
        super().__init__()
        self.dtype, self.device = like.keys.dtype, like.keys.device
        self.is_initialized = True
        self.seen = 0
        self._owner = owner
        self.rows = 0
        # Zeros, not whatever was there: a masked number counts for nothing, a masked NaN does not.
        self.buffers = [_like(kept, 0, 0) for kept in (like.keys, like.values)]

    def reserve(self, rows: int, places: int) -> None:
        """Makes room for so many rows and places."""
        have_rows, have_places = self.buffers[0].shape[0], self.buffers[0].shape[2]
        if rows <= have_rows and places <= have_places:
            return
        if rows > have_rows:
            have_rows = max(rows, 2 * have_rows, 4)
        have_places = max(have_places, -(-places // _BLOCK) * _BLOCK)
        old, self.buffers = self.buffers, [_like(b, have_rows, have_places) for b in self.buffers]
        for before, buffer in zip(old, self.buffers, strict=True):
            buffer[: before.shape[0], :, : before.shape[2]] = before

    def append(self, keys_HLD: Tensor, values_HLD: Tensor) -> None:
        self.reserve(self.rows + 1, keys_HLD.shape[1])
        for buffer, given in zip(self.buffers, (keys_HLD, values_HLD), strict=True):
            buffer[self.rows, :, : given.shape[1]] = given
            buffer[self.rows, :, given.shape[1] :] = 0  # of whoever was here before
        self.rows += 1

    def remove(self, row: int, last: int) -> None:
        for buffer in self.buffers:
            if row != last:
                buffer[row] = buffer[last]
        self.rows -= 1

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes each row's new key and value at its own place; returns all that may be seen."""
        rows_R, places_R = self._owner.order_R, self._owner.positions_R
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows_R, :, places_R] = new[:, :, 0]
        self.keys, self.values = (b[: self.rows, :, : self.seen] for b in self.buffers)
        return self.keys, self.values


def _like(buffer: Tensor, rows: int, places: int) -> Tensor:
    return buffer.new_zeros(rows, buffer.shape[1], places, buffer.shape[3])


def copies_of(cache: DynamicCache, count: int) -> Sequence[DynamicCache]:
    """The cache itself and `count` − 1 others with the same content."""
    import copy

    return [cache, *(copy.deepcopy(cache) for _ in range(count - 1))]
