"""The engine as the fault suite runs it: real, or scripted where the job says so, and marked.

The mark is a lock of its own, outside the run directory, that no part of Bridge knows: whoever
finds it taken has met a second engine of the same job, and says so. It is taken first and held to
the end, however that comes, also by a process that stands still.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import sys
import time
from pathlib import Path

MARKS = "marks"
VIOLATIONS = "two-engines.log"


def mark(run: Path) -> int:
    """Takes the job's mark; the descriptor that holds it."""
    folder = run.parents[1] / MARKS
    folder.mkdir(exist_ok=True)
    path = folder / run.name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (folder / VIOLATIONS).open("a") as file:
            file.write(f"{run.name}: pid {os.getpid()} met another, see {path}\n")
    os.write(descriptor, f"{time.monotonic():.3f} pid {os.getpid()}\n".encode())
    return descriptor


if __name__ == "__main__":
    spec, directory = Path(sys.argv[2]), Path(sys.argv[sys.argv.index("--dir") + 1])
    held = mark(directory)
    name = json.loads(spec.read_text())["name"] or ""
    scripted = name.startswith("{")
    module = "tests.support.scripted_engine" if scripted else "bridge_engine"
    runpy.run_module(module, run_name="__main__", alter_sys=True)
