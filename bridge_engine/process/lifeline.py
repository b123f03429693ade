"""What ties an engine to whoever started it: a pipe that closes with them, and a deadline.

The pipe tells that they died. Somebody who was stopped, hangs or is cut off from the database keeps
the pipe open, though; so they also write down, after each renewal of their lease, until when they
hold it. Once that is past, the job may be another attempt's, and this process ends.

The deadline is eight bytes of shared memory and no message in the pipe: all ranks of a torchrun job
read one pipe, where each message would reach one of them; and a process that was stopped for a
while must know the newest deadline at once, not after it has read all those before.

A run by hand has neither, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import sys
import tempfile
import threading
import time
from typing import NoReturn

EXIT_FAILED = 1
LOOK_SECONDS = 0.5
"""Longest time between two looks at the deadline: it may also be taken back."""


class Deadline:
    """A moment by `time.monotonic()`, which is one clock for the whole machine, that processes
    share. Whoever has the descriptor may read and move it."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._moment = memoryview(self._map).cast("d")  # one store: never half a number

    @classmethod
    def create(cls, moment: float) -> Deadline:
        """A new one."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("bridge-deadline")
        else:
            descriptor, path = tempfile.mkstemp()
            os.unlink(path)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        deadline = cls(descriptor)
        deadline.set(moment)
        return deadline

    def set(self, moment: float) -> None:
        """Moves it; 0 is long past."""
        self._moment[0] = moment

    @property
    def passed(self) -> bool:
        """Is it over?"""
        return time.monotonic() > self._moment[0]

    def left(self) -> float:
        """Seconds until then."""
        return self._moment[0] - time.monotonic()

    def close(self) -> None:
        """Gives the memory and the descriptor back; others keep theirs."""
        self._moment.release()
        self._map.close()
        os.close(self.descriptor)


_deadline: Deadline | None = None


def hold(pipe: int, deadline: int | None = None) -> None:
    """Ties this process to both, by their file descriptors, from now on.

    Under torchrun they are the launcher's: it was given them and does not hand them on, but they
    can be opened through it.
    """
    global _deadline
    if "TORCHELASTIC_RUN_ID" in os.environ:
        folder = f"/proc/{os.getppid()}/fd"
        pipe = os.open(f"{folder}/{pipe}", os.O_RDONLY)
        deadline = None if deadline is None else os.open(f"{folder}/{deadline}", os.O_RDWR)
    _deadline = None if deadline is None else Deadline(deadline)
    threading.Thread(target=_watch, args=(pipe,), name="lifeline", daemon=True).start()


def check() -> None:
    """Ends this process if its time is over; called before whatever others would see.

    The watching thread may be late: a process that was stopped and goes on runs whichever of its
    threads it likes.
    """
    if _deadline is not None and _deadline.passed:
        _leave("the lease of whoever started this engine ran out")


def _watch(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        seconds = LOOK_SECONDS if _deadline is None else min(LOOK_SECONDS, _deadline.left())
        if poll.poll(max(1.0, 1000 * seconds)) and not os.read(pipe, 1):
            _leave("whoever started this engine ended")
        check()


def _leave(why: str) -> NoReturn:
    """At once, with all that belongs to the run: helpers, and torchrun with the other ranks."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{why}; leaving at once, the next attempt goes on", file=sys.stderr, flush=True)
    # Only groups that were made for this run: a shell's or a test's would take others along.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _kill_group_of(os.getppid())
    _kill_group_of(os.getpid())
    os._exit(EXIT_FAILED)


def _kill_group_of(leader: int) -> None:
    with contextlib.suppress(OSError):
        if leader > 1 and os.getpgid(leader) == leader:
            os.killpg(leader, signal.SIGKILL)
