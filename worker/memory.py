"""Did memory run out? The kernel counts whom it killed for it, and its counters are asked.

Every SIGKILL looks alike, and most are not about memory: an operator, a container that is stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridge_engine.process.memory import levers, memory_advice
from bridge_engine.spec.job import parse_spec

WINDOW_SECONDS = 30.0
"""How long before its end a process may have been killed: one with much memory takes its time."""

Counts = Mapping[str, int]


class OomWatch:
    """Watches the kernel's counters of out-of-memory kills: `look` often, then ask `rose`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._seen: deque[tuple[float, Counts]] = deque()
        self.look()

    @property
    def blind(self) -> bool:
        """This system has no such counters."""
        return not self._seen[-1][1]

    def look(self) -> None:
        """Remembers what the counters say now."""
        now = time.monotonic()
        while len(self._seen) > 1 and self._seen[1][0] < now - WINDOW_SECONDS:
            self._seen.popleft()
        self._seen.append((now, counts(self._root)))

    def rose(self) -> bool:
        """Has somebody been killed for want of memory in the last half minute?

        Of this process's own control group where the kernel counts by those, else of the machine.
        """
        before, now = self._seen[0][1], counts(self._root)
        return any(count > before.get(name, count) for name, count in now.items())


def counts(root: Path = Path("/")) -> dict[str, int]:
    """Kills so far, by the counter that says so: of our control groups, or else the machine's."""
    groups = {str(path): found for path in _group_files(root) if (found := _oom_kill(path)) >= 0}
    if groups:
        return groups
    vmstat = root / "proc/vmstat"
    found = _oom_kill(vmstat)
    return {str(vmstat): found} if found >= 0 else {}


def _group_files(root: Path) -> Iterator[Path]:
    """The counters of this process's control groups, in version 2 (`0::/path`) and version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        inside = path.strip("/")
        # In a container the path may be the host's, while the mount shows the container's own.
        if number == "0":
            yield from (mount / inside / "memory.events", mount / "memory.events")
        elif "memory" in controllers.split(","):
            own = mount / "memory"
            yield from (own / inside / "memory.oom_control", own / "memory.oom_control")


def _oom_kill(path: Path) -> int:
    try:
        words = path.read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return -1


def out_of_memory(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The error of a job whose engine the kernel killed for want of memory. Trying again would only
    get there again."""
    read = parse_spec(spec)
    found = levers(read)
    return {
        "category": "oom",
        "code": "out_of_memory",
        "message": "memory ran out: the kernel killed the engine for it (its counter of "
        f"out-of-memory kills rose); {memory_advice(read)}",
        "param": found[0][0] if found else "model",
        "retryable": False,
    }
