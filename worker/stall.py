"""An engine that lives and does nothing: noticed by its silence, asked where it stands.

A collective that waits for a rank, a helper that never answers, a deadlock, a process that somebody
stopped: none of them ends by itself, and from outside they look alike. Progress is events arriving.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from service.store import breakdown
from worker.family import family
from worker.forward import Forwarder

_ANSWER_SECONDS = 3.0
"""How long a process has to write its stacks; it does so in a signal handler, at once."""
_FRAMES = 3
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')


def stalled(forward: Forwarder, word: str, run: Path) -> dict[str, Any]:
    """The error of an engine that has been silent for too long, with where each of its processes
    stands. The stacks of all threads go to RUN/engine.log."""
    where = [_where(process, run / "engine.log") for process in family(word)]
    places = "; ".join(sorted(filter(None, where))) or "no process told where it stands"
    return breakdown(
        "infra",
        "engine_stalled",
        f"The engine was silent for {forward.silence():.0f} s at step {forward.step} in phase "
        f"{forward.phase} and was ended; innermost frames: {places}. All stacks are in engine.log. "
        "If a step may take this long, raise BRIDGE_STALL_SECONDS or the spec's "
        "runtime.stall_seconds.",
    )


def _where(process: psutil.Process, log: Path) -> str:
    """`pid N at file:line in function ← …`, or that it is stopped; empty for a process that is no
    engine, such as torchrun itself or a verifier's helper."""
    try:
        if not _catches(process.pid, signal.SIGUSR1):
            return ""
        if process.status() == psutil.STATUS_STOPPED:
            return f"pid {process.pid} is stopped (SIGSTOP)"
        before = log.stat().st_size
        process.send_signal(signal.SIGUSR1)
        said = _said_after(log, before)
    except (psutil.Error, OSError):
        return ""
    frames = innermost(said)
    return f"pid {process.pid} at {' ← '.join(frames)}" if frames else ""


def innermost(dump: str) -> list[str]:
    """The innermost frames of the main thread in what faulthandler wrote: it comes last."""
    frames: list[str] = []
    for line in dump.splitlines():
        if "(most recent call first)" in line:
            frames = []
        elif match := _FRAME.match(line):
            frames.append(f"{Path(match['file']).name}:{match['line']} in {match['name']}")
    return frames[:_FRAMES]


def _said_after(log: Path, offset: int) -> str:
    """What has come into the log since, once nothing more comes."""
    until, size = time.monotonic() + _ANSWER_SECONDS, offset
    while time.monotonic() < until:
        time.sleep(0.1)
        now = log.stat().st_size
        if now > offset and now == size:
            break
        size = now
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _catches(pid: int, number: int) -> bool:
    """Does the process handle this signal? One that does not would be ended by it."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False
    return False
