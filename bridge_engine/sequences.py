"""Token sequences as the trainer sees them: a prompt, a completion, and what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bridge_engine.sharing import Sharing


ENOUGH = 16
"""Sequences that keep a processor busy: a pass over fewer costs more for each of them."""
PADDING = 0.05
"""Share of a micro-batch from which on it is worth two passes."""


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

    Their tokens lie in R rows of length L, in one of three forms:

    *Padded* (`pad`): a row each, padded on the right. That needs no attention mask, since a causal
    model never looks at what comes after.

    *Packed* (`pack`): end to end in one row, without padding. Where positions start again at 0 a
    sequence begins, and transformers keeps attention within each.

    *Shared* (`share`): a row for each prompt, its completions end to end behind it. Each token
    attends to the prompt and to what came before in its own completion, at the position it would
    have there.
    """

    tokens_RL: Tensor
    position_ids_RL: Tensor | None
    """Place of each token in its sequence; None: its place in the row (padded)."""
    attention_R1LL: Tensor | None
    """True where a token (row) attends to another (column); None: by the rules above."""
    firsts_B: Tensor
    """Where the first completion token of each sequence is predicted, counting through all rows:
    at the last one of its prompt."""
    starts_B: Tensor
    """Where each completion begins, counting through all rows."""
    mask_BT: Tensor
    """1 on real completion tokens."""
    behaviour_BT: Tensor
    weights_BT: Tensor
    advantages_B: Tensor

    @property
    def targets_N(self) -> Tensor:
        """Where the N real completion tokens lie, sequence after sequence, through all rows."""
        steps_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        return (self.starts_B.unsqueeze(1) + steps_T)[self.mask_BT.bool()]

    @property
    def predictions_N(self) -> Tensor:
        """Where each of them is predicted: one before, but for the first of a completion."""
        steps_T = torch.arange(self.mask_BT.shape[1], device=self.mask_BT.device)
        places_BT = self.starts_B.unsqueeze(1) + steps_T - 1
        places_BT[:, :1] = self.firsts_B.unsqueeze(1)
        return places_BT[self.mask_BT.bool()]


def micro_batches(
    sequences: Sequence[TokenSequence],
    size: int,
    *,
    pad_id: int,
    device: torch.device,
    packed: bool = False,
    sharing: Sharing | None = None,
) -> Iterator[MicroBatch]:
    """Splits into micro-batches of at most `size` sequences, by length so that little is padding:
    where lengths differ much, into smaller ones.

    `packed` leaves no padding at all; with `sharing`, sequences of one prompt share it where that
    saves computing.
    """
    groups: list[list[TokenSequence]] = []
    if sharing is not None and not packed:
        groups, sequences = sharing.split(sequences, size)
    for chosen in _filled(sorted(groups, key=row_length), size):
        yield share(chosen, pad_id=pad_id, device=device)
    for alone in _of_like_length(sequences, size, padded=not packed):
        yield pack(alone, device=device) if packed else pad(alone, pad_id=pad_id, device=device)


def _of_like_length(
    sequences: Sequence[TokenSequence], size: int, *, padded: bool
) -> Iterator[list[TokenSequence]]:
    """The sequences by length, in stretches of at most `size`; if they are to be padded, a stretch
    of `ENOUGH` ends where the next one would make more than `PADDING` of it padding."""
    stretch: list[TokenSequence] = []
    tokens = 0
    for sequence in sorted(sequences, key=len):
        count, tokens = len(stretch) + 1, tokens + len(sequence)
        wasteful = padded and count > ENOUGH and tokens < (1 - PADDING) * count * len(sequence)
        if stretch and (count > size or wasteful):
            yield stretch
            stretch, tokens = [], len(sequence)
        stretch.append(sequence)
    if stretch:
        yield stretch


def _filled(
    groups: Sequence[list[TokenSequence]], size: int
) -> Iterator[list[list[TokenSequence]]]:
    """The groups, in order, in stretches of at most `size` sequences."""
    stretch: list[list[TokenSequence]] = []
    for group in groups:
        if stretch and sum(map(len, stretch)) + len(group) > size:
            yield stretch
            stretch = []
        stretch.append(group)
    if stretch:
        yield stretch


def pad(sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, a row each."""
    tokens_RL = _rows([s.prompt + s.completion for s in sequences], pad_id)
    longest = tokens_RL.shape[1]
    starts = [row * longest + len(s.prompt) for row, s in enumerate(sequences)]
    return _micro_batch(sequences, tokens_RL, [i - 1 for i in starts], starts, device)


def pack(sequences: Sequence[TokenSequence], *, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, end to end in one row."""
    tokens_RL = torch.tensor([[t for s in sequences for t in s.prompt + s.completion]])
    positions_RL = torch.tensor([[i for s in sequences for i in range(len(s))]])
    begins = accumulate(map(len, sequences[:-1]), initial=0)
    starts = [begin + len(s.prompt) for begin, s in zip(begins, sequences, strict=True)]
    firsts = [i - 1 for i in starts]
    return _micro_batch(sequences, tokens_RL, firsts, starts, device, positions_RL)


def share(
    groups: Sequence[Sequence[TokenSequence]], *, pad_id: int, device: torch.device
) -> MicroBatch:
    """One micro-batch of groups of sequences, those of a group of one prompt: a row a group."""
    prompts = [group[0].prompt for group in groups]
    rows = [p + [t for s in g for t in s.completion] for p, g in zip(prompts, groups, strict=True)]
    tokens_RL = _rows(rows, pad_id)
    owners_RL = torch.full_like(tokens_RL, -1)
    """Whose each token is: 0 the prompt's, 1, 2, … the completions', -1 nobody's."""
    positions_RL = torch.zeros_like(tokens_RL)
    firsts, starts = [], []
    for row, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        place = len(prompt)
        owners_RL[row, :place] = 0
        positions_RL[row, :place] = torch.arange(place)
        for owner, sequence in enumerate(group, start=1):
            here = slice(place, place + len(sequence.completion))
            owners_RL[row, here] = owner
            positions_RL[row, here] = torch.arange(len(prompt), len(sequence))
            firsts.append(row * tokens_RL.shape[1] + len(prompt) - 1)
            starts.append(row * tokens_RL.shape[1] + place)
            place = here.stop
    own_RLL = owners_RL.unsqueeze(2) == owners_RL.unsqueeze(1)
    attention_RLL = (own_RLL | (owners_RL == 0).unsqueeze(1)).tril()
    return _micro_batch(
        [sequence for group in groups for sequence in group],
        tokens_RL,
        firsts,
        starts,
        device,
        positions_RL,
        attention_RLL.unsqueeze(1),
    )


def row_length(group: Sequence[TokenSequence]) -> int:
    """Tokens of a group of one prompt in a row of its own."""
    return len(group[0].prompt) + sum(len(s.completion) for s in group)


def _rows(rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """The rows of tokens, padded on the right."""
    tokens_RL = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens_RL[place, : len(row)] = torch.tensor(row)
    return tokens_RL


def _micro_batch(
    sequences: Sequence[TokenSequence],
    tokens_RL: Tensor,
    firsts: list[int],
    starts: list[int],
    device: torch.device,
    positions_RL: Tensor | None = None,
    attention_R1LL: Tensor | None = None,
) -> MicroBatch:
    """All forms alike: what is known of each completion token, aligned to the longest."""
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
        tokens_RL=tokens_RL.to(device),
        position_ids_RL=None if positions_RL is None else positions_RL.to(device),
        attention_R1LL=None if attention_R1LL is None else attention_R1LL.to(device),
        firsts_B=torch.tensor(firsts, device=device),
        starts_B=torch.tensor(starts, device=device),
        mask_BT=mask.to(device),
        behaviour_BT=behaviour.to(device),
        weights_BT=weights.to(device),
        advantages_B=torch.tensor(
            [s.advantage for s in sequences], dtype=torch.float32, device=device
        ),
    )
