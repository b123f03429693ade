"""Waiting for what another thread or process does: for the thing itself, and for as long as a busy
machine may take. What a test says of time is said by what it sees, not by how long it looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

Found = TypeVar("Found")
PATIENCE = 120.0
"""Seconds; it is a failure that takes them, never a test that passes."""


def until(
    true: Callable[[], Found], seconds: float = PATIENCE, otherwise: Callable[[], str] | str = ""
) -> Found:
    """What it comes to, once that is true; fails with what is to be said `otherwise`."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            said = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(said or f"it did not happen within {seconds:.0f} s")
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    """Has the process ended, or will it?"""
    try:
        until(lambda: not _runs(pid))
    except AssertionError:
        return False
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
