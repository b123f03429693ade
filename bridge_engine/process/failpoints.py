"""Named places where tests make a process die, stand still or fail: `tests/faults`.

BRIDGE_FAILPOINTS names a folder. A file NAME in it, which holds `kill`, `stop` or `raise`, arms the
place of that name: whoever comes by first takes the file and does that to itself, once. Unset, as
it is outside of tests, a failpoint is one look at a constant.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_FOLDER = os.environ.get("BRIDGE_FAILPOINTS")

KILL, STOP, RAISE = "kill", "stop", "raise"


class FailpointReached(Exception):
    """A test asked for an exception here."""


def reached(name: str) -> None:
    """This process is at the place of that name."""
    if _FOLDER is None:
        return
    armed, mine = Path(_FOLDER) / name, Path(_FOLDER) / f".{name}.{os.getpid()}"
    try:
        os.rename(armed, mine)  # one process gets it
        action = mine.read_text().strip()
        mine.unlink()
    except FileNotFoundError:
        return
    if action == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if action == STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == RAISE:
        raise FailpointReached(f"failpoint {name}")
