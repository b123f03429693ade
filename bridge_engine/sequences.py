"""Token sequences as the trainer sees them: a prompt, a completion, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and its completion, as token ids; the completion includes its EOS if it has one."""

    prompt: list[int]
    completion: list[int]
    behaviour: list[float] | None = None
    """Log-probability of each completion token under whatever sampled it (rollouts only)."""
    advantage: float = 0.0
    weights: list[float] | None = None
    """What each completion token's loss is multiplied with (importance correction); None: 1."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B sequences for one forward pass, their completions aligned to one length T.

    Their tokens lie in R rows of length L, in one of two forms:

    *Padded* (`pad`): a row each, padded on the right. That needs no attention mask, since a causal
    model never looks at what comes after.

    *Packed* (`pack`): end to end in one row, without padding. Where positions start again at 0 a
    sequence begins, and transformers keeps attention within each.
    """

    tokens_RL: Tensor
    position_ids_RL: Tensor | None
    """Place of each token in its sequence (packed); None: its place in the row (padded)."""
    starts_B: Tensor
    """Where each sequence begins, counting through all rows."""
    prompt_lengths_B: Tensor
    mask_BT: Tensor
    """1 on real completion tokens."""
    behaviour_BT: Tensor
    weights_BT: Tensor
    advantages_B: Tensor

    @property
    def predictions_N(self) -> Tensor:
        """Where the prediction of each of the N real completion tokens is made, sequence after
        sequence, counting through all rows; the token predicted is the next one."""
        steps_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        firsts_B = self.starts_B + self.prompt_lengths_B - 1
        return (firsts_B.unsqueeze(1) + steps_T)[self.mask_BT.bool()]


def micro_batches(
    sequences: Sequence[TokenSequence],
    size: int,
    *,
    pad_id: int,
    device: torch.device,
    packed: bool = False,
) -> Iterator[MicroBatch]:
    """Splits into micro-batches of at most `size`, sorted by length so that little is padding;
    `packed` leaves no padding at all."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), size):
        chosen = ordered[start : start + size]
        yield pack(chosen, device=device) if packed else pad(chosen, pad_id=pad_id, device=device)


def pad(sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, a row each."""
    longest = max(map(len, sequences))
    tokens = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence.prompt + sequence.completion)
    starts = [row * longest for row in range(len(sequences))]
    return _micro_batch(sequences, tokens, None, starts, device)


def pack(sequences: Sequence[TokenSequence], *, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, end to end in one row."""
    tokens = torch.tensor([[t for s in sequences for t in s.prompt + s.completion]])
    position_ids = torch.tensor([[i for s in sequences for i in range(len(s))]])
    starts = list(accumulate(map(len, sequences[:-1]), initial=0))
    return _micro_batch(sequences, tokens, position_ids.to(device), starts, device)


def _micro_batch(
    sequences: Sequence[TokenSequence],
    tokens: Tensor,
    position_ids: Tensor | None,
    starts: list[int],
    device: torch.device,
) -> MicroBatch:
    """Both forms alike: what is known of each completion token, aligned to the longest."""
    longest = max(len(s.completion) for s in sequences)
    mask = torch.zeros(len(sequences), longest)
    behaviour = torch.zeros(len(sequences), longest)
    weights = torch.ones(len(sequences), longest)
    for row, sequence in enumerate(sequences):
        mask[row, : len(sequence.completion)] = 1
        if sequence.behaviour is not None:
            behaviour[row, : len(sequence.completion)] = torch.tensor(sequence.behaviour)
        if sequence.weights is not None:
            weights[row, : len(sequence.completion)] = torch.tensor(sequence.weights)
    return MicroBatch(
        tokens_RL=tokens.to(device),
        position_ids_RL=position_ids,
        starts_B=torch.tensor(starts, device=device),
        prompt_lengths_B=torch.tensor([len(s.prompt) for s in sequences], device=device),
        mask_BT=mask.to(device),
        behaviour_BT=behaviour.to(device),
        weights_BT=weights.to(device),
        advantages_B=torch.tensor(
            [s.advantage for s in sequences], dtype=torch.float32, device=device
        ),
    )
