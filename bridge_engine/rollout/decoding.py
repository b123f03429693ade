"""What makes a decode step cheap: a cache with room to grow, and attention without copies.

transformers' own cache is copied whole for every token, its mask is computed anew, and where
several query heads share a key head the keys are copied for each. None of this changes a result:
here the new keys are written behind the old ones, the mask is a slice of one that is made once, and
the query heads of one key head stand as a sequence of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

_NAME = "bridge_decoding"


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer, with room behind them for the tokens to come."""

    def __init__(self, filled: DynamicLayer, rows_R: Tensor, room: int) -> None:
        """Of these rows of a filled layer, for at most `room` further tokens."""
        super().__init__()
        self.dtype, self.device = filled.dtype, filled.device
        self.is_initialized = True
        self._length = filled.keys.shape[-2]
        self._buffers = [_with_room(kept, rows_R, room) for kept in (filled.keys, filled.values)]
        self._look()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values (R × heads × 1 × D) behind the others; returns all."""
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : self._length + new.shape[-2]] = new
        self._length += key_states.shape[-2]
        return self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        room = self._buffers[0].shape[-2] - self._length
        self._buffers = [_with_room(kept, indices, room) for kept in (self.keys, self.values)]
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


def _with_room(kept: Tensor, rows_R: Tensor, room: int) -> Tensor:
    """The rows of R × heads × L × D, in a tensor of L + room."""
    length = kept.shape[-2]
    buffer = kept.new_empty(len(rows_R), kept.shape[1], length + room, kept.shape[-1])
    torch.index_select(kept, 0, rows_R, out=buffer[:, :, :length])
    return buffer


def is_plain(model: Any, cache: DynamicCache) -> bool:
    """Is this all there is to the model's attention: torch's own, over every token so far?"""
    return model.config._attn_implementation == "sdpa" and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Within: the model attends by `grouped_attention`, and takes a mask as `mask_RL` makes it."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row (query R × query heads × 1 × D) to all that came before."""
    rows, heads, _new, depth = query.shape
    attended = F.scaled_dot_product_attention(
        query.view(rows, key.shape[1], heads // key.shape[1], depth),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, grouped_attention)
