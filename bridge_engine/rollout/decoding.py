"""Decoding by a model's own modules: a cache with room to grow, and attention without copies.

transformers' own cache is copied whole for every token, its mask is computed anew, and where
several query heads share a key head the keys are copied for each. None of this changes a result:
here the new keys are written behind the old ones, the mask is a slice of one that is made once, and
the query heads of one key head stand as a sequence of queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from bridge_engine.forward.logits import head_logits

_NAME = "bridge_decoding"


@dataclass(frozen=True)
class Prompts:
    """P prompts, padded on the left to one length L, a multiple of 8 (see `native.rung`)."""

    tokens_PL: Tensor
    mask_PL: Tensor
    """True on real tokens."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> Prompts:
        """From lists of token ids."""
        longest = -(-max(map(len, prompts)) // 8) * 8
        tokens_PL = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
        mask_PL = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
        return cls(tokens_PL.to(device), mask_PL.to(device))

    @property
    def positions_PL(self) -> Tensor:
        """Place of each token in its prompt; 0 for padding."""
        return (self.mask_PL.cumsum(1) - 1).clamp(min=0)


class Decoder(Protocol):
    """Writes on behind prompts, a token a row at a time; what it has read it keeps."""

    def start(self, prompts: Prompts, rows_R: Tensor, room: int) -> Tensor:
        """Reads the prompts, then goes on with R rows, each behind the prompt it names, for at most
        `room` tokens; logits R × V of what comes next."""
        ...

    def keep(self, rows_R: Tensor) -> None:
        """Goes on with these of the rows alone."""
        ...

    def step(self, tokens_R: Tensor) -> Tensor:
        """Reads a further token a row; logits R × V of what comes next."""
        ...


class ModuleDecoder:
    """A `Decoder` on the forward pass of any model, and on transformers' cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self, prompts: Prompts, rows_R: Tensor, room: int) -> Tensor:
        """See `Decoder`."""
        self.cache = DynamicCache(config=self.model.config)
        self.length = prompts.mask_PL.shape[1]
        positions_PL = prompts.positions_PL
        logits_PV = self._pass(prompts.tokens_PL, prompts.mask_PL, positions_PL)
        self.positions_R = positions_PL[rows_R, -1]
        self.mask = F.pad(prompts.mask_PL[rows_R], (0, room), value=True)
        self.plain = is_plain(self.model, self.cache)
        if self.plain:
            self.cache.layers = [RoomyLayer(layer, rows_R, room) for layer in self.cache.layers]
            self.mask = additive(self.mask, logits_PV.dtype)
        elif len(rows_R) > len(prompts.tokens_PL):
            self.cache.batch_select_indices(rows_R)
        return logits_PV[rows_R]

    def keep(self, rows_R: Tensor) -> None:
        """See `Decoder`."""
        self.cache.batch_select_indices(rows_R)
        self.mask, self.positions_R = self.mask[rows_R], self.positions_R[rows_R]

    def step(self, tokens_R: Tensor) -> Tensor:
        """See `Decoder`."""
        self.length += 1
        self.positions_R = self.positions_R + 1
        with decoding(self.model) if self.plain else nullcontext():
            return self._pass(
                tokens_R.unsqueeze(1),
                self.mask[..., : self.length],
                self.positions_R.unsqueeze(1),
            )

    def _pass(self, tokens_RT: Tensor, mask: Tensor, positions_RT: Tensor) -> Tensor:
        hidden_RTD = self.model.base_model(
            input_ids=tokens_RT,
            attention_mask=mask,
            position_ids=positions_RT,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return head_logits(self.model, hidden_RTD[:, -1])


def additive(mask_RL: Tensor, dtype: torch.dtype) -> Tensor:
    """R × 1 × 1 × L: what is added to attention scores, 0 where the mask is true."""
    zeros_RL = torch.zeros(mask_RL.shape, dtype=dtype, device=mask_RL.device)
    return zeros_RL.masked_fill_(~mask_RL, -torch.inf)[:, None, None]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer, with room behind them for the tokens to come."""

    def __init__(self, filled: DynamicLayer, rows_R: Tensor, room: int) -> None:
        """Of these rows of a filled layer, for at most `room` further tokens."""
        super().__init__()
        self.dtype, self.device = filled.dtype, filled.device
        self.is_initialized = True
        self._length = filled.keys.shape[-2]
        self._buffers = [with_room(kept, rows_R, room) for kept in (filled.keys, filled.values)]
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
        self._buffers = [with_room(kept, indices, room) for kept in (self.keys, self.values)]
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


def with_room(kept: Tensor, rows_R: Tensor, room: int, along: int = 2) -> Tensor:
    """The rows of R × heads × L × D, in a tensor of L + room (L may stand elsewhere)."""
    length, shape = kept.shape[along], list(kept.shape)
    shape[0], shape[along] = len(rows_R), length + room
    buffer = kept.new_empty(shape)
    torch.index_select(kept, 0, rows_R, out=buffer.narrow(along, 0, length))
    return buffer


def is_plain(model: Any, cache: DynamicCache) -> bool:
    """Is this all there is to the model's attention: torch's own, over every token so far?"""
    return model.config._attn_implementation == "sdpa" and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Within: the model attends by `grouped_attention`, and takes a mask as `additive` makes it."""
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
