"""Folders from the artifact store on this machine's disk: fetched once, verified, bounded in size.

A folder is known by its manifest's SHA-256, so it can never be an older one of the same name. Those
that were asked for the longest ago make room. Several threads and processes may share a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.state.checkpoint import MANIFEST
from service.artifacts.store import ArtifactStore, Stored

IN_USE_SECONDS = 120.0
"""Somebody may be reading what was asked for so recently: it does not make room."""


class ArtifactCache:
    """Verified copies of publications under one folder."""

    def __init__(self, folder: Path, most_bytes: int, artifacts: ArtifactStore) -> None:
        self._folder = folder
        self._most = most_bytes
        self._artifacts = artifacts

    def folder(self, stored: Stored) -> Path:
        """Where the publication lies; fetched if it is not there.

        Raises Damaged, ArtifactsUnavailable, EngineError (`disk_full`).
        """
        place = self._folder / stored.sha256
        if not self._used(place):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked(stored.sha256):
                if not self._used(place):
                    self._artifacts.get(stored, place)
                    self._used(place)
                    self._make_room(place)
        return place

    def _used(self, place: Path) -> bool:
        """Is it there? Then it has been asked for now."""
        if not (place / MANIFEST).exists():
            return False
        now = time.time_ns()  # the file system's own clock ticks too rarely to tell who was first
        with contextlib.suppress(OSError):
            os.utime(place, ns=(now, now))
        return True

    def _make_room(self, newest: Path) -> None:
        entries = []
        for place in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if not place.name.startswith(".") and place.is_dir():
                    size = sum(path.stat().st_size for path in place.iterdir())
                    entries.append((place.stat().st_mtime_ns, size, place))
        total = sum(size for _, size, _ in entries)
        for used_at, size, place in sorted(entries):
            idle = time.time() - used_at / 1e9
            if total <= self._most or place == newest or idle < IN_USE_SECONDS:
                continue
            aside = self._folder / f".gone-{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):
                os.rename(place, aside)  # at once: nobody sees half of it
                shutil.rmtree(aside, ignore_errors=True)
                total -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One fetches, the others wait for it."""
        path = self._folder / f".lock-{name[:2]}"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
