"""Token sequences as the trainer sees them: a prompt, a completion, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
class Padded:
    """A micro-batch of B sequences; completions are right-padded to one length T.

    Padded: one sequence a row, right-padded to one length L. That needs no attention mask: a causal
    model never looks at what comes after. Packed: all sequences end to end in one row; their
    position ids start again at 0, by which transformers keeps them from seeing one another.
    """

    tokens_BL: Tensor
    position_ids_BL: Tensor | None
    """None where they count from 0 in every row."""
    rows_B: Tensor
    """The row of each sequence."""
    starts_B: Tensor
    """Where in its row each sequence starts."""
    prompt_lengths_B: Tensor
    mask_BT: Tensor
    """1 on real completion tokens."""
    behaviour_BT: Tensor
    weights_BT: Tensor
    advantages_B: Tensor

    @property
    def positions_BT(self) -> Tensor:
        """Where in its row the prediction of each completion token is made."""
        steps_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        firsts_B = self.starts_B + self.prompt_lengths_B - 1
        return (firsts_B.unsqueeze(1) + steps_T).clamp(max=self.tokens_BL.shape[1] - 1)


def micro_batches(
    sequences: Sequence[TokenSequence],
    size: int,
    *,
    pad_id: int,
    device: torch.device,
    packed: bool = False,
) -> Iterator[Padded]:
    """Splits into micro-batches of at most `size`, sorted by length so that little is padding."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), size):
        yield pad(ordered[start : start + size], pad_id=pad_id, device=device, packed=packed)


def pad(
    sequences: Sequence[TokenSequence],
    *,
    pad_id: int,
    device: torch.device,
    packed: bool = False,
) -> Padded:
    """One micro-batch of these sequences."""
    lengths_B = torch.tensor([len(s) for s in sequences])
    if packed:
        tokens = torch.tensor([[t for s in sequences for t in (*s.prompt, *s.completion)]])
        positions = torch.cat([torch.arange(n) for n in lengths_B.tolist()]).unsqueeze(0)
        rows, starts = torch.zeros_like(lengths_B), lengths_B.cumsum(0) - lengths_B
    else:
        tokens = torch.full((len(sequences), int(lengths_B.max())), pad_id)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence.prompt + sequence.completion)
        positions = None
        rows, starts = torch.arange(len(sequences)), torch.zeros_like(lengths_B)
    longest = max(len(s.completion) for s in sequences)
    mask = torch.zeros(len(sequences), longest)
    behaviour, weights = torch.zeros_like(mask), torch.ones_like(mask)
    for row, sequence in enumerate(sequences):
        mask[row, : len(sequence.completion)] = 1
        if sequence.behaviour is not None:
            behaviour[row, : len(sequence.completion)] = torch.tensor(sequence.behaviour)
        if sequence.weights is not None:
            weights[row, : len(sequence.completion)] = torch.tensor(sequence.weights)
    return Padded(
        tokens_BL=tokens.to(device),
        position_ids_BL=None if positions is None else positions.to(device),
        rows_B=rows.to(device),
        starts_B=starts.to(device),
        prompt_lengths_B=torch.tensor([len(s.prompt) for s in sequences], device=device),
        mask_BT=mask.to(device),
        behaviour_BT=behaviour.to(device),
        weights_BT=weights.to(device),
        advantages_B=torch.tensor(
            [s.advantage for s in sequences], dtype=torch.float32, device=device
        ),
    )
