"""Every random draw is a function of (seed, purpose, index), never of global state.

A run that resumes at step 40 draws what it would have drawn had it never stopped, with no RNG state
to save and none to lose.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that belongs to this seed, purpose and index alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_draw(items: Sequence[T], count: int, *, seed: int, purpose: str, step: int) -> list[T]:
    """The `count` items of `step` when the items are gone through in shuffled epochs.

    Position `step * count + i` of an endless row of permutations, one permutation an epoch: no item
    comes twice before every item came once, and nothing but (seed, step) is needed to know which.
    """
    chosen: list[T] = []
    order: list[int] = []
    current_epoch = -1
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(items))
        if epoch != current_epoch:
            permutation = torch.randperm(len(items), generator=generator(seed, purpose, epoch))
            order, current_epoch = permutation.tolist(), epoch
        chosen.append(items[order[place]])
    return chosen
