"""Looking after the other ranks: whatever ends one of them ends all, with one error event.

The main thread may be blocked in a collective that will never end, so a thread of each rank looks,
several times a second, whether a rank has reported a failure (through the store that the ranks met
at), whether a rank on this machine is gone, and whether torchrun is.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from bridge_engine.events import EXIT_FAILED, Event, EventWriter, Failed

EVERY_S = 0.2
"""Seconds between two looks."""
HEARD_WITHIN_S = 10.0
"""How long a failing rank waits for rank 0 to have said so."""

_FAILURE, _OVER = "failure", "over"


class EndingWriter(EventWriter):
    """Two threads report here, and nothing comes after a failure."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._lock = threading.Lock()
        self._failed = False

    def emit(self, event: Event) -> None:
        """Appends the event, unless the run has failed already."""
        with self._lock:
            if not self._failed:
                super().emit(event)
            self._failed |= isinstance(event, Failed)


class Watch:
    """The watching thread of one rank. `where` is every rank's (machine, process id)."""

    def __init__(self, rank: int, where: Sequence[tuple[str, int]]) -> None:
        self.rank = rank
        here = socket.gethostname()
        self._neighbours = {
            other: pid for other, (host, pid) in enumerate(where) if host == here and other != rank
        }
        self._parent = os.getppid()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # a connection of its own: the process group may hold the other one in a long wait
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
        )
        # torchrun keeps its store over restarts, where an old failure must not be found again
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"bridge/{attempt}", store)

    def start(self, events: EventWriter) -> None:
        """Begins to look; rank 0 reports to `events` what it sees."""
        self._thread = threading.Thread(
            target=self._look, args=(events,), name="rank-watch", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Looks no more: the ranks have parted in agreement."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def fail(self, failure: Failed, events: EventWriter) -> None:
        """Makes this rank's failure the run's; returns once rank 0 has reported it."""
        self._stopped.set()
        try:
            if self.rank == 0:
                events.emit(failure)
                self._store.set(_OVER, "")
                return
            if not self._store.check([_FAILURE]):
                self._store.set(_FAILURE, failure.model_dump_json())
            deadline = time.monotonic() + HEARD_WITHIN_S
            while not self._store.check([_OVER]) and time.monotonic() < deadline:
                if 0 in self._neighbours and not _alive(self._neighbours[0]):
                    return
                time.sleep(EVERY_S / 4)
        except RuntimeError:  # the store is gone, and with it whoever could be told
            return

    def _look(self, events: EventWriter) -> None:
        while not self._stopped.wait(EVERY_S):
            if os.getppid() != self._parent:
                os._exit(EXIT_FAILED)  # torchrun was killed: nobody looks after this process
            try:
                failure = self._seen()
            except RuntimeError:
                failure = _lost("the one that the processes met at")
            if failure is None or self._stopped.is_set():
                continue
            if self.rank == 0:
                self.fail(failure, events)
            print(f"rank {self.rank}: {failure.message}", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)

    def _seen(self) -> Failed | None:
        """What ended another rank, if anything did."""
        if self.rank == 0 and self._store.check([_FAILURE]):
            return Failed.model_validate_json(self._store.get(_FAILURE))
        if self.rank != 0 and self._store.check([_OVER]):
            return _lost("rank 0, which says why,")
        for other, pid in self._neighbours.items():
            if not _alive(pid):
                return _lost(f"rank {other} (pid {pid})")
        return None


def _lost(who: str) -> Failed:
    return Failed(
        step=None,
        category="infra",
        code="rank_lost",
        message=f"a process of the run was lost: {who} ended; the log of whoever started it says "
        "how; run the job again, it goes on from its last checkpoint",
        retryable=True,
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
