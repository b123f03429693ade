"""Which workers of this machine are alive, and which have died.

A worker holds a lock on a file named after it, and the kernel lets go of the lock in the moment the
worker ends, however it ends. So a free lock proves a death, where a pid would not: pids are used
again. Of workers elsewhere, and of those without such a file, nothing is known here; their jobs
wait for the lease to run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from pathlib import Path
from types import TracebackType

from worker import log


def worker_name() -> str:
    """HOST:PID:WORD, this process for people and for a job's record; the word is never used
    again. A slot's number follows after one more colon."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class Presence:
    """This worker's lock, held while the `with` block runs; and a look at those of others."""

    def __init__(self, home: Path) -> None:
        self.name = worker_name()
        self._folder = home / "workers"
        self._lock: int | None = None

    def __enter__(self) -> Presence:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not inherited by the engine: it must not look as if the worker lived on in it.
            self._lock = os.open(self._folder / self.name, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:  # a full disk, say: then this worker's leases have to run out
            log.warning("no file to be known by", because=error)
            self._forget()  # it would look like a dead worker's
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._forget()
        if self._lock is not None:
            os.close(self._lock)

    def is_gone(self, worker_id: str) -> bool:
        """Has the worker of this id, as jobs carry it, certainly ended?"""
        name = worker_id.rpartition(":")[0]
        # Locks reach no further than one machine where the folder lies on a network.
        ours = name.startswith(f"{socket.gethostname()}:") and "/" not in name
        return ours and name != self.name and self._free(self._folder / name)

    def forget_dead(self) -> None:
        """Deletes the files of workers that have ended."""
        for path in self._folder.glob(f"{socket.gethostname()}:*"):
            if path.name != self.name and self._free(path):
                path.unlink(missing_ok=True)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            (self._folder / self.name).unlink()

    def _free(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return False  # no such file, or not ours to look at: nothing is known
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)
