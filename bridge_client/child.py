"""A child process of the supervisor's: how it is started, what it says, when it is tried again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge_client.home import Process

SHORTEST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a dead child is started again: doubled each time between these two."""
STABLE = 60.0
"""Seconds of life after which a child's earlier deaths are forgiven."""
UP_FD = "BRIDGE_UP_FD"
"""The variable with the number of the descriptor into which a child may write that it is up."""


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    process: Process | None = None
    deaths: int = 0
    born: float = 0.0
    start_at: float = 0.0
    """Monotonic seconds; not started before."""
    log_begin: int = 0
    """Bytes of the log that were there before its last start."""

    up: int | None = None
    """Our end of the pipe into which it says that it is up."""

    def start(self) -> None:
        if self.up is not None:
            os.close(self.up)
        self.up, its_end = os.pipe()
        os.set_blocking(self.up, False)
        with self.log.open("ab") as log:
            self.log_begin = log.tell()
            self.popen = subprocess.Popen(
                self.command,
                env=self.environment | {UP_FD: str(its_end)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[its_end],
                process_group=0,  # a terminal's Ctrl-C reaches the supervisor alone
            )
        os.close(its_end)
        self.born = time.monotonic()
        self.process = Process.of(self.popen.pid)

    def is_up(self) -> bool:
        """Has it said so, by a byte into BRIDGE_UP_FD? True once; for a child that serves no
        address which could be asked."""
        if self.up is None:
            return False
        try:
            return bool(os.read(self.up, 1))
        except BlockingIOError:
            return False

    def said(self) -> str:
        """The end of what it has printed since its last start."""
        with self.log.open("rb") as log:
            log.seek(self.log_begin)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-15:])

    def died(self) -> int | None:
        """The exit status of a child that has ended since the last look."""
        if self.popen is None:
            return None
        status = self.popen.poll()
        if status is None:
            return None
        self.popen = self.process = None
        if time.monotonic() - self.born > STABLE:
            self.deaths = 0
        pause = min(SHORTEST_PAUSE * 2**self.deaths, LONGEST_PAUSE)
        self.deaths += 1
        self.start_at = time.monotonic() + pause
        return status
