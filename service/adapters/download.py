"""An adapter as one zip archive, the same bytes each time, hashed before the first of them is sent.

The archive is made twice, once to be hashed and once to be sent, and never lies on a disk: its
entries are not compressed (weights do not shrink) and carry no time.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge_engine.state.checkpoint import manifest
from service.adapters.card import model_card
from service.adapters.files import WEIGHTS, check_weights
from service.artifacts import Damaged
from service.store import AdapterRow, JobRow

CHUNK = 1 << 20
FILES = ("adapter_config.json", WEIGHTS, "bridge.json")
README = "README.md"
_THEN = (1980, 1, 1, 0, 0, 0)
"""The earliest time an archive can say."""
_LARGE = 1 << 31
"""From so many bytes on an entry needs the long form of the format."""


@dataclass(frozen=True)
class Package:
    """An archive that is ready to be sent."""

    folder: Path
    readme: bytes
    sha256: str
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The archive, piece by piece."""
        return _archive(self.folder, self.readme)


def package(
    adapter: AdapterRow, job: JobRow, folder: Path, evaluations: Sequence[JobRow] = ()
) -> Package:
    """The adapter's archive, with the scores of its evaluations in its card. Raises Damaged unless
    every file is what it was registered as."""
    check_weights(adapter, folder)
    for name, expected in manifest(folder).items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise Damaged(f"{folder / name} is not what its manifest says")
    readme = model_card(adapter, job, evaluations).encode()
    digest, size = hashlib.sha256(), 0
    for chunk in _archive(folder, readme):
        digest.update(chunk)
        size += len(chunk)
    return Package(folder, readme, digest.hexdigest(), size)


class _Pipe:
    """A file that is only written to; what was written is taken out at the other end."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


def _archive(folder: Path, readme: bytes) -> Iterator[bytes]:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # type: ignore[call-overload]
        archive.writestr(zipfile.ZipInfo(README, _THEN), readme)
        names = FILES if (folder / WEIGHTS).is_file() else sorted({*manifest(folder)} - {README})
        for name in names:
            path = folder / name
            if not path.is_file():
                continue
            large = path.stat().st_size >= _LARGE
            entry = zipfile.ZipInfo(name, _THEN)
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=large) as target:
                while data := file.read(CHUNK):
                    target.write(data)
                    yield pipe.take()
    yield pipe.take()
