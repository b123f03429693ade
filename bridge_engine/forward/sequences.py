"""Token sequences as the trainer sees them: a prompt, a completion, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from bridge_engine.forward.attention import Block, SharedLayout, seen_behind

if TYPE_CHECKING:
    from bridge_engine.forward.sharing import Sharing

Item = TypeVar("Item")
Number = TypeVar("Number", int, float)

ENOUGH = 16
"""Sequences that keep a processor busy: a pass over fewer costs more for each of them."""
ENOUGH_TO_ATTEND = 8
"""The same of sequences whose attention alone is computed by themselves."""
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

    The last token of a completion is predicted and predicts nothing: it is not passed. The others
    lie in R rows of length L, in one of three forms:

    *Padded* (`pad`): a row each, padded on the right. That needs no attention mask, since a causal
    model never looks at what comes after.

    *Packed* (`pack`): end to end in one row, without padding. Where positions start again at 0 a
    sequence begins, and transformers keeps attention within each.

    *Shared* (`share`): in one row, each prompt once, and then all completions, which attend to
    their prompt and have the positions that they would have behind it (`SharedLayout`).
    """

    tokens_RL: Tensor
    position_ids_RL: Tensor | None
    """Place of each token in its sequence; None: its place in the row (padded)."""
    shared: SharedLayout | None
    firsts_B: Tensor
    """Where the first completion token of each sequence is predicted, counting through all rows:
    at the last one of its prompt."""
    starts_B: Tensor
    """Where each completion begins, counting through all rows."""
    targets_N: Tensor
    """The N real completion tokens, sequence after sequence."""
    mask_BT: Tensor
    """1 on real completion tokens."""
    behaviour_BT: Tensor
    weights_BT: Tensor
    advantages_B: Tensor

    @property
    def predictions_N(self) -> Tensor:
        """Where each completion token is predicted, counting through all rows: one before it, but
        for the first of a completion."""
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
    for chosen in _filled(groups, size):
        yield share(chosen, pad_id=pad_id, device=device)
    for alone in _of_like_length(sequences, len, size, padded=not packed):
        yield pack(alone, device=device) if packed else pad(alone, pad_id=pad_id, device=device)


def _of_like_length(
    items: Sequence[Item],
    length: Callable[[Item], int],
    size: int,
    *,
    enough: int = ENOUGH,
    padded: bool = True,
) -> Iterator[list[Item]]:
    """The items by length, in stretches of at most `size`; if they are to be padded, a stretch
    of `enough` ends where the next one would make more than `PADDING` of it padding."""
    stretch: list[Item] = []
    tokens = 0
    for item in sorted(items, key=length):
        count, tokens = len(stretch) + 1, tokens + length(item)
        wasteful = padded and count > enough and tokens < (1 - PADDING) * count * length(item)
        if stretch and (count > size or wasteful):
            yield stretch
            stretch, tokens = [], length(item)
        stretch.append(item)
    if stretch:
        yield stretch


def _filled(groups: Sequence[list[TokenSequence]], size: int) -> Iterator[list[TokenSequence]]:
    """The sequences of the groups, by the length of their prompts, at most `size` at a time and no
    group in two parts; what their prompts would be padded with is kept low as by `_of_like_length`,
    but for a few sequences much of it is too much as well."""
    stretch: list[TokenSequence] = []
    prompts: list[int] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: len(group[0].prompt)):
        longest = len(group[0].prompt)
        more = longest + sum(len(s.completion) for s in group)
        padding = sum(longest - prompt for prompt in prompts)
        limit = PADDING if len(stretch) >= ENOUGH else 5 * PADDING
        wasteful = padding > limit * (tokens + more)
        if stretch and (wasteful or len(stretch) + len(group) > size):
            yield stretch
            stretch, prompts, tokens = [], [], 0
        stretch = stretch + group
        prompts.append(longest)
        tokens += more
    if stretch:
        yield stretch


def pad(sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, a row each."""
    tokens_RL = _rows([_passed(s) for s in sequences], pad_id)
    longest = tokens_RL.shape[1]
    starts = [row * longest + len(s.prompt) for row, s in enumerate(sequences)]
    return _micro_batch(sequences, tokens_RL, [i - 1 for i in starts], starts, device)


def pack(sequences: Sequence[TokenSequence], *, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, end to end in one row."""
    rows = [_passed(s) for s in sequences]
    tokens_RL = torch.tensor([[token for row in rows for token in row]])
    positions_RL = torch.tensor([[place for row in rows for place in range(len(row))]])
    begins = accumulate(map(len, rows[:-1]), initial=0)
    starts = [begin + len(s.prompt) for begin, s in zip(begins, sequences, strict=True)]
    firsts = [i - 1 for i in starts]
    return _micro_batch(sequences, tokens_RL, firsts, starts, device, positions_RL)


def share(sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device) -> MicroBatch:
    """One micro-batch of these sequences, each of their prompts passed once."""
    places = {
        prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(s.prompt) for s in sequences))
    }
    prompt_of = [places[tuple(s.prompt)] for s in sequences]
    prompts_PS = _rows([list(prompt) for prompt in places], pad_id)
    count, length = prompts_PS.shape
    tokens = [prompts_PS.flatten()]
    positions = [torch.arange(length).repeat(count)]
    starts = [0] * len(sequences)
    blocks: list[Block] = []
    begin = count * length
    going_on = [i for i, s in enumerate(sequences) if len(s.completion) > 1]
    stretches = _of_like_length(
        going_on, lambda i: len(sequences[i].completion), len(sequences), enough=ENOUGH_TO_ATTEND
    )
    for chosen in stretches:
        tokens_BT = _rows([sequences[i].completion[:-1] for i in chosen], pad_id)
        rows, longest = tokens_BT.shape
        behind_B1 = torch.tensor([[len(sequences[i].prompt)] for i in chosen])
        tokens.append(tokens_BT.flatten())
        positions.append((behind_B1 + torch.arange(longest)).flatten())
        mask_B1TL = seen_behind(behind_B1, length, longest).to(device)
        prompts_B = torch.tensor([prompt_of[i] for i in chosen], device=device)
        blocks.append(Block(begin, longest, mask_B1TL, rows, prompts_B))
        for row, i in enumerate(chosen):
            starts[i] = begin + row * longest
        begin += rows * longest
    firsts = [p * length + len(s.prompt) - 1 for p, s in zip(prompt_of, sequences, strict=True)]
    return _micro_batch(
        sequences,
        torch.cat(tokens).unsqueeze(0),
        firsts,
        starts,
        device,
        torch.cat(positions).unsqueeze(0),
        SharedLayout.of(count, length, blocks),
    )


def _passed(sequence: TokenSequence) -> list[int]:
    """What a forward pass has to see of a sequence."""
    return sequence.prompt + sequence.completion[:-1]


def _rows(rows: Sequence[list[int]], pad_id: int) -> Tensor:
    """The rows of tokens, padded on the right."""
    return torch.tensor(_filled_up(rows, pad_id, max(map(len, rows))), dtype=torch.long)


def _filled_up(rows: Iterable[list[Number]], value: Number, length: int) -> list[list[Number]]:
    return [row + [value] * (length - len(row)) for row in rows]


def _micro_batch(
    sequences: Sequence[TokenSequence],
    tokens_RL: Tensor,
    firsts: list[int],
    starts: list[int],
    device: torch.device,
    positions_RL: Tensor | None = None,
    shared: SharedLayout | None = None,
) -> MicroBatch:
    """All forms alike: what is known of each completion token, aligned to the longest."""
    longest = max(len(s.completion) for s in sequences)

    def aligned(rows: Iterable[list[float]], value: float) -> Tensor:
        return torch.tensor(_filled_up(rows, value, longest), dtype=torch.float32, device=device)

    return MicroBatch(
        tokens_RL=tokens_RL.to(device),
        position_ids_RL=None if positions_RL is None else positions_RL.to(device),
        shared=shared,
        firsts_B=torch.tensor(firsts, device=device),
        starts_B=torch.tensor(starts, device=device),
        targets_N=torch.tensor(
            [t for s in sequences for t in s.completion], dtype=torch.long, device=device
        ),
        mask_BT=aligned(([1.0] * len(s.completion) for s in sequences), 0.0),
        behaviour_BT=aligned((s.behaviour or [] for s in sequences), 0.0),
        weights_BT=aligned((s.weights or [] for s in sequences), 1.0),
        advantages_B=torch.tensor(
            [s.advantage for s in sequences], dtype=torch.float32, device=device
        ),
    )
