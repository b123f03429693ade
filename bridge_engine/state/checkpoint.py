"""Checkpoints that a crash cannot tear.

A checkpoint is written into a temporary folder beside its place, each file synced to disk, a
manifest with every file's SHA-256 last, and only then renamed. A folder whose manifest does not
verify is not a checkpoint: loading falls back to the one before it. Adapters and merged models are
published the same way. Loads no torch: the worker and the service verify folders by this page too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge_engine.errors import EngineError
from bridge_engine.process import failpoints, lifeline

MANIFEST = "manifest.json"
SPARE_BYTES = 64 * 2**20
"""Room that must be left on the disk beside what is to be written."""


def step_folder(step: int) -> str:
    """Name of a step's folder; sorts as the steps do."""
    return f"step-{step:06d}"


def publish(final: Path, write: Callable[[Path], None], *, expected_bytes: int = 0) -> None:
    """Makes the folder `final` appear whole or not at all; `write` fills the folder it is given.

    Raises EngineError(`disk_full`) with what is needed and what there is.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with disk_errors(final.parent, expected_bytes):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            hashes = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            if manifest(final) == hashes and is_whole(final):
                return  # a step computed again, to the same bytes: leave what may be in use
            (temporary / MANIFEST).write_text(json.dumps(hashes, indent=1))
            for path in temporary.iterdir():
                sync(path)
            sync(temporary)
            failpoints.reached("in_checkpoint")
            lifeline.check()  # writing may have taken long, or this process was stopped
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
            sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def step_of(name: str) -> int | None:
    """The step in the name of a step's folder; None of another name."""
    digits = name.removeprefix("step-")
    return int(digits) if digits != name and digits.isascii() and digits.isdigit() else None


def step_folders(parent: Path) -> list[Path]:
    """The folders of steps, by their numbers: the names grow longer from step 1 000 000 on."""
    steps = {folder: step_of(folder.name) for folder in parent.glob("step-*")}
    found = [(step, folder) for folder, step in steps.items() if step is not None]
    return [folder for _, folder in sorted(found)]


def is_whole(folder: Path) -> bool:
    """Does every file have the hash that the manifest says?"""
    hashes = manifest(folder)
    try:
        return bool(hashes) and all(sha256_of(folder / n) == h for n, h in hashes.items())
    except OSError:
        return False


def manifest(folder: Path) -> dict[str, str]:
    """File names and their hashes; empty where there is no manifest that can be read."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def newest_whole(parent: Path) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint that verifies, or None; the newer ones that do not)."""
    torn: list[Path] = []
    for folder in reversed(step_folders(parent)):
        if is_whole(folder):
            return folder, torn
        torn.append(folder)
    return None, torn


def set_aside(folder: Path) -> None:
    """Takes a damaged checkpoint out of the row, so that it is neither tried nor counted again."""
    aside = folder.with_name(f".damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def prune(parent: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints and that of the step `best`."""
    spared = None if best is None else step_folder(best)
    for folder in step_folders(parent)[:-keep]:
        if folder.name != spared:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what crashes left half-written."""
    for folder in parent.glob(".step-*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_errors(folder: Path, expected_bytes: int = 0) -> Iterator[None]:
    """Checks for room first, and turns a full disk into an error that says so."""
    free = shutil.disk_usage(folder).free
    if free < expected_bytes + SPARE_BYTES:
        raise _disk_full(folder, free, expected_bytes)
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise _disk_full(folder, shutil.disk_usage(folder).free, expected_bytes) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """No space, or no quota, left? safetensors says so in words alone."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if type(error).__name__ == "SafetensorError":  # known by name: a slim image has none
        return any(f"os error {code})" in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes


def _disk_full(folder: Path, free: int, expected: int) -> EngineError:
    need = (expected + SPARE_BYTES) / 2**20
    return EngineError(
        f"the disk under {folder} is full: {free / 2**20:.0f} MiB free, {need:.0f} MiB needed; "
        "free some space and run the job again, it goes on from its last checkpoint",
        code="disk_full",
        category="infra",
        retryable=True,
    )


def sync(path: Path) -> None:
    """Returns once the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
