"""The ranks of a run over torch.distributed: gloo between CPUs, NCCL between GPUs.

Gradients are added up by torch's all-reduce once a gradient, when every pass of this rank is done,
and not by DistributedDataParallel. A step makes several gradients over different parameter sets, a
rank may have more passes than another or none, and the losses are normalised by the whole update's
counts already: what is wanted is one sum of what has accumulated, where DDP averages in the hooks
of each backward pass and expects every one of them to reach the same parameters on every rank.

The sum is deterministic for a given number of ranks: two runs of N processes agree to the last bit,
and with one process to rounding.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.watch import EndingWriter, Watch
from bridge_engine.errors import EngineError
from bridge_engine.events import EXIT_FAILED, Event, EventWriter, Failed

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others. One may be far behind: it writes a checkpoint, its answers
are long, its judging runs into rl.verifier_timeout. A dead rank is noticed at once by `Watch`."""
BUCKET = 1 << 24
"""Elements that are summed in one call."""


class Ranks(World):
    """This process and those that torchrun started with it."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        gpus = torch.cuda.device_count()
        # NCCL wants a GPU for every rank; gloo lets ranks share one
        cuda = "nccl" if gpus >= self.local_size else "gloo"
        with _losses():
            dist.init_process_group(f"cpu:gloo,cuda:{cuda}" if gpus else "gloo", timeout=PATIENCE)
        where = self.gather((socket.gethostname(), os.getpid()))
        self._watch = Watch(self.rank, where)

    # ------------------------------------------------------------------ agreeing

    def gather(self, value: T) -> list[T]:
        found: list[T | None] = [None] * self.size
        with _losses():
            dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        result = [work() if self.is_first else None]
        with _losses():
            dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _losses():
                dist.all_reduce(flat)
            totals = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, total in zip(bucket, totals, strict=True):
                tensor.copy_(total.view_as(tensor))

    def agree(self, tensors: Sequence[Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        if len(set(self.gather(digest.hexdigest()))) > 1:
            raise EngineError(
                "the processes' parameters are no longer the same, so one of them computes "
                "otherwise (another kind of processor or library, or broken hardware); go on from "
                "the last checkpoint on processes that are alike",
                code="ranks_diverged",
                category="infra",
            )

    # ------------------------------------------------------------------ beginning and ending

    def events(self, directory: Path) -> EventWriter:
        writer = EndingWriter(directory) if self.is_first else Unheard(directory)
        self._watch.start(writer)
        return writer

    def fail(self, failure: Failed, events: EventWriter) -> None:
        """Rank 0 reports it and ends; another rank tells rank 0, waits for it, and ends.

        Without the process group's own farewell: the others may be anywhere.
        """
        self._watch.fail(failure, events)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.stop()
        self.gather(None)  # nobody leaves while another could still need it
        dist.destroy_process_group()


class Unheard(EventWriter):
    """What the ranks that do not write report to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "events.jsonl"
        self.started_before = False

    def emit(self, event: Event) -> None:
        """Says nothing."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in stretches of one dtype and a limited size."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _losses() -> Iterator[None]:
    """A rank that died shows as an error of whatever the others do together."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        print(error, file=sys.stderr)  # long, and of no use to whoever reads the event
        raise EngineError(
            "another process of the run was lost; the log of whoever started it says how it "
            "ended; run the job again, it goes on from its last checkpoint",
            code="rank_lost",
            category="infra",
            retryable=True,
        ) from error
