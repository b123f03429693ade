"""All processes of one engine, wherever they are: in its group, in sessions of their own (the ranks
of torchrun), or left behind by a parent that died.

Each engine is started with a word of its own in the environment, which whatever it starts inherits.
"""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

WORD = "BRIDGE_ENGINE_ID"


def family(word: str) -> list[psutil.Process]:
    """The living processes that carry the word, and their children."""
    found: dict[int, psutil.Process] = {}
    mark = f"{WORD}={word}".encode()
    for process in psutil.process_iter():
        if _carries(process.pid, process, mark):
            found[process.pid] = process
            with contextlib.suppress(psutil.Error):
                found |= {child.pid: child for child in process.children(recursive=True)}
    found.pop(os.getpid(), None)
    return list(found.values())


def word_of(pid: int) -> str | None:
    """The word that a process carries, if it can be seen."""
    try:
        return psutil.Process(pid).environ().get(WORD)
    except (psutil.Error, OSError):
        return None


def end_family(word: str) -> list[int]:
    """Kills every process that carries the word; the pids."""
    killed = []
    for process in family(word):
        # psutil looks that the pid is still this process
        with contextlib.suppress(psutil.Error):
            process.kill()
            killed.append(process.pid)
    return killed


def end_group(pid: int) -> None:
    """Kills a process and, if it leads one, its group."""
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _carries(pid: int, process: psutil.Process, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False  # it has just ended
    except OSError:
        return False
    with contextlib.suppress(psutil.Error, OSError):  # no /proc: macOS
        name, _, value = mark.decode().partition("=")
        return process.environ().get(name) == value
    return False
