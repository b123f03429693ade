"""Several processes as one trainer: what they share out, and what they agree on.

`torchrun --nproc-per-node N -m bridge_engine run …` starts N ranks. Each holds the whole step: its
problems, rollouts, rewards and demonstrations are token ids, which are small, so that a method's
page knows nothing of ranks. What is large is shared out: sampling by rows, judging by answers, the
passes by sequences. Rank 0 alone writes.

A `World` is what one process needs of all this, which is nothing, and imports no torch;
`bridge_engine.distributed.process_group.Ranks` is the same over torch.distributed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from bridge_engine.events import EventWriter, Failed
from bridge_engine.metrics import Metrics

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class World:
    """A process that trains alone. A context manager: leaving it is what the ranks do together."""

    rank = 0
    """This process among those of the run."""
    size = 1
    """How many there are."""
    local_rank = 0
    """This process among those on its machine."""
    local_size = 1
    """How many there are on this machine."""

    @property
    def is_first(self) -> bool:
        """Is this the rank that writes?"""
        return self.rank == 0

    # ------------------------------------------------------------------ sharing out

    def spread(self, items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """`work` done on every item by one of the ranks, each on a stretch of them; all results, in
        the order of the items, on every rank. A rank without items does no work."""
        mine = items[stretch(len(items), self.rank, self.size)]
        found = work(mine) if mine else []
        return [result for part in self.gather(found) for result in part]

    def balanced(self, items: Sequence[T], cost: Callable[[T], int] = len) -> list[T]:  # type: ignore[assignment]
        """This rank's share of the items, so that every rank's cost about the same. The longest
        first, each to the rank with the least so far: a function of the items alone."""
        if self.size == 1:
            return list(items)
        loads = [0] * self.size
        mine: list[T] = []
        for item in sorted(items, key=cost, reverse=True):
            least = loads.index(min(loads))
            loads[least] += cost(item)
            if least == self.rank:
                mine.append(item)
        return mine

    # ------------------------------------------------------------------ agreeing

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 alone does; its result on every rank. Nobody goes on before it is done."""
        return work()

    def any(self, flag: bool) -> bool:
        """Is it so on any rank?"""
        return any(self.gather(flag))

    def add(self, figures: Metrics) -> Metrics:
        """The sums over the ranks, in their order; a figure that a rank lacks is 0 there."""
        total: Metrics = {}
        for part in self.gather(figures):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks: the same bits on every rank."""

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Raises EngineError (`ranks_diverged`) unless the tensors are the same on every rank."""

    # ------------------------------------------------------------------ beginning and ending

    def events(self, directory: Path) -> EventWriter:
        """What this rank reports to."""
        return EventWriter(directory)

    def fail(self, failure: Failed, events: EventWriter) -> None:
        """Reports a failure of this rank, and ends the others."""
        events.emit(failure)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def stretch(count: int, rank: int, size: int) -> slice:
    """The `rank`-th of `size` stretches of `count` items; their lengths differ by one at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


def join() -> World:
    """The processes that torchrun (or whoever set RANK and WORLD_SIZE) started with this one."""
    if not _is_rank():
        return World()
    from bridge_engine.distributed.process_group import Ranks

    return Ranks()


def leave(status: int) -> NoReturn:
    """Ends this process, a rank at once: the threads of torch and gloo may still be there when the
    interpreter is taken apart around them, and a run that is done must not end by SIGABRT."""
    if _is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_rank() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
