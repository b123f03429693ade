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
    """A micro-batch: B sequences right-padded to one length L, completions to one length T.

    Right-padding needs no attention mask: a causal model never looks at what comes after.
    """

    tokens_BL: Tensor
    prompt_lengths_B: Tensor
    mask_BT: Tensor
    """1 on real completion tokens."""
    behaviour_BT: Tensor
    weights_BT: Tensor
    advantages_B: Tensor

    @property
    def positions_BT(self) -> Tensor:
        """Where in the sequence the prediction of each completion token is made."""
        steps_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        return (self.prompt_lengths_B.unsqueeze(1) - 1 + steps_T).clamp(
            max=self.tokens_BL.shape[1] - 1
        )


def micro_batches(
    sequences: Sequence[TokenSequence], size: int, *, pad_id: int, device: torch.device
) -> Iterator[Padded]:
    """Splits into micro-batches of at most `size`, sorted by length so that little is padding."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), size):
        yield pad(ordered[start : start + size], pad_id=pad_id, device=device)


def pad(sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device) -> Padded:
    """One micro-batch of these sequences."""
    longest = max(map(len, sequences))
    completion_longest = max(len(s.completion) for s in sequences)
    tokens = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), completion_longest)
    behaviour = torch.zeros(len(sequences), completion_longest)
    weights = torch.ones(len(sequences), completion_longest)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence.prompt + sequence.completion)
        mask[row, : len(sequence.completion)] = 1
        if sequence.behaviour is not None:
            behaviour[row, : len(sequence.completion)] = torch.tensor(sequence.behaviour)
        if sequence.weights is not None:
            weights[row, : len(sequence.completion)] = torch.tensor(sequence.weights)
    return Padded(
        tokens_BL=tokens.to(device),
        prompt_lengths_B=torch.tensor([len(s.prompt) for s in sequences], device=device),
        mask_BT=mask.to(device),
        behaviour_BT=behaviour.to(device),
        weights_BT=weights.to(device),
        advantages_B=torch.tensor(
            [s.advantage for s in sequences], dtype=torch.float32, device=device
        ),
    )
