"""An engine that lives and does nothing: noticed by its silence, asked where it stands.

A collective that waits for a rank, a helper that never answers, a deadlock, a process that somebody
stopped: none of them ends by itself, and from outside they look alike. Progress is events arriving.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from service.store import breakdown
from worker.family import family
from worker.forward import Forwarder

_LOOKS, _LOOK_SECONDS = 100, 0.1
"""For so long a process has time to write its stacks. It does so in a signal handler, at once, but
for a machine that is busy; looks are counted and not seconds, as it may stand still with us."""
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
        if not _has("SigCgt", f"/proc/{process.pid}", signal.SIGUSR1):
            return ""
        if process.status() == psutil.STATUS_STOPPED:
            return f"pid {process.pid} is stopped (SIGSTOP)"
        said = _answer(process, log)
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


def _answer(process: psutil.Process, log: Path) -> str:
    """What has come into the log once the process has written all its stacks: the main thread's,
    which we want, are the last."""
    deaf, offset = set(_at_it(process.pid)), log.stat().st_size
    process.send_signal(signal.SIGUSR1)
    for _ in range(_LOOKS):
        time.sleep(_LOOK_SECONDS)
        if log.stat().st_size > offset and deaf.issuperset(_at_it(process.pid)):
            break
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def _at_it(pid: int) -> Iterator[str]:
    """The threads that the signal waits for, or that keep it off: as one does that handles it."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        if any(_has(mask, thread, signal.SIGUSR1) for mask in ("SigPnd", "ShdPnd", "SigBlk")):
            yield thread.name


def _has(mask: str, place: Path | str, number: int) -> bool:
    """Is the signal in this mask of the process or thread? `SigCgt`: one that does not handle it
    would be ended by it."""
    with contextlib.suppress(OSError, ValueError):
        for line in (Path(place) / "status").read_text().splitlines():
            if line.startswith(f"{mask}:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
