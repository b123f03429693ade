"""A process that can be told from all others, also later and also by another process.

A pid alone is used again, and means another process on another machine or in another container.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, of one boot of one machine."""

    host: str
    boot_id: str
    namespace: str
    """The pid namespace, that is, the container."""
    pid: int
    started: int
    """Clock ticks after the machine's boot."""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """That of a process that runs now; None if none does, or if this system has no /proc."""
        try:
            # the name in brackets may hold anything
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                return None  # ended; nobody has asked how yet
            return cls(*_here(), pid, int(fields[19]))
        except (OSError, ValueError, IndexError):
            return None

    @classmethod
    def parse(cls, document: Any) -> ProcessIdentity | None:
        """What `as_dict` gave; None if it is something else."""
        try:
            return cls(**{name: document[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def is_running(self) -> bool:
        """Certainly this process, and it runs on this machine."""
        return self == ProcessIdentity.of(self.pid)

    @property
    def is_here(self) -> bool:
        """Would this machine know of it if it still ran?"""
        try:
            return (self.host, self.boot_id, self.namespace) == _here()
        except OSError:
            return False

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def _here() -> tuple[str, str, str]:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node(), boot_id, os.readlink("/proc/self/ns/pid")
