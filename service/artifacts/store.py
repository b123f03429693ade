"""The artifact store: folders that appear whole or not at all, on any file system fsspec knows.

A published folder lies under a prefix that is never written twice, `JOB/PATH/ATTEMPT-HASH`, its
files first and its `manifest.json` last. The manifest (`bridge_engine.state.checkpoint` writes it)
holds the SHA-256 of every file; the manifest's own is in the database row that names the prefix. So
what is fetched is verified from the row down to the last byte, and a prefix whose manifest is not
there is no artifact: half an upload of somebody who died.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from bridge_engine.state.checkpoint import MANIFEST, disk_errors, is_disk_full, sha256_of, sync
from service.artifacts.errors import ArtifactsUnavailable, Damaged

CONNECTION = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 1}}
"""For S3, in seconds: a server that is gone must be noticed, one that is slow must not be left. Who
calls tries again, longer than the library would."""


@dataclass(frozen=True)
class Stored:
    """A folder in the store."""

    prefix: str
    sha256: str
    """Of its manifest."""
    bytes: int
    """Of all its files."""


class ArtifactStore:
    """One store. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        """`url` as fsspec has it: `file:///mnt/shared/bridge`, `s3://bucket/prefix`.

        Keys and endpoint come from where the file system's own library looks for them (`AWS_*`).
        """
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        options: dict[str, Any] = {"skip_instance_cache": True}
        if protocol in ("file", "local"):
            options["auto_mkdir"] = True
        if protocol in ("s3", "s3a"):
            options |= {"use_listings_cache": False, "config_kwargs": CONNECTION}
        self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        self._local = protocol in ("file", "local")

    def put(self, folder: Path, prefix: str, wanted: Callable[[], bool] = lambda: True) -> Stored:
        """Publishes a folder that has a manifest. `wanted` is asked before each file: where it says
        no, the upload ends with ArtifactsUnavailable.

        Raises Damaged if the folder is not what its own manifest says, ArtifactsUnavailable.
        """
        names = _names(folder / MANIFEST, str(folder))
        size = 0
        for name, expected in names.items():
            path = folder / name
            _check(expected, _hash(path), str(path))
            size += path.stat().st_size
            self._upload(path, f"{prefix}/{name}", wanted)
        self._upload(folder / MANIFEST, f"{prefix}/{MANIFEST}", wanted)
        return Stored(prefix, sha256_of(folder / MANIFEST), size)

    def get(self, stored: Stored, folder: Path) -> None:
        """Fetches a publication: `folder` appears whole and verified, or not at all.

        Raises Damaged that names the file at fault, ArtifactsUnavailable, EngineError
        (`disk_full`).
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        mark = f"{os.getpid()}-{threading.get_ident()}"
        temporary = folder.with_name(f".{folder.name}.{mark}.tmp")
        with disk_errors(folder.parent, stored.bytes):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                self._download(f"{stored.prefix}/{MANIFEST}", temporary / MANIFEST, stored.sha256)
                names = _names(temporary / MANIFEST, stored.prefix)
                for name, expected in names.items():
                    self._download(f"{stored.prefix}/{name}", temporary / name, expected)
                sync(temporary)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(temporary, folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def read(self, stored: Stored, name: str) -> bytes:
        """One file of a publication, verified as `get` does it; raises Damaged (also where it has
        no such file), ArtifactsUnavailable."""
        with tempfile.TemporaryDirectory() as folder:
            manifest, file = Path(folder) / MANIFEST, Path(folder) / "file"
            self._download(f"{stored.prefix}/{MANIFEST}", manifest, stored.sha256)
            expected = _names(manifest, stored.prefix).get(name)
            if expected is None:
                raise Damaged(f"{stored.prefix} has no {name}")
            self._download(f"{stored.prefix}/{name}", file, expected)
            return file.read_bytes()

    def publications(self, job_id: str) -> set[str]:
        """The prefixes under which the job has anything, whole or not."""
        with self._reaching(missing=None):
            found = self._fs.find(self._path(job_id))
            root = self._path("")
            files = (PurePosixPath(str(path).removeprefix(root).lstrip("/")) for path in found)
            return {str(file.parent) for file in files}
        return set()

    def delete(self, prefix: str) -> None:
        """Deletes all that lies under a prefix; its manifest first, so that half of it is never
        taken for whole. What is not there is no error."""
        with self._reaching(missing=None):
            self._fs.rm_file(self._path(f"{prefix}/{MANIFEST}"))
        with self._reaching(missing=None):
            self._fs.rm(self._path(prefix), recursive=True)

    def check(self) -> None:
        """Raises ArtifactsUnavailable unless the store answers, and to us."""
        with self._reaching(missing="there is no such bucket or folder"):
            if self._local:
                os.makedirs(self._root, exist_ok=True)
            elif not self._fs.exists(self._root.partition("/")[0]):
                raise FileNotFoundError(self._root)

    def _upload(self, path: Path, key: str, wanted: Callable[[], bool]) -> None:
        if not wanted():
            raise ArtifactsUnavailable("the upload was given up")
        with self._reaching(missing="there is no such bucket or folder"):
            self._fs.put_file(str(path), self._path(key))
            if self._local:
                sync(Path(self._path(key)))
                sync(Path(self._path(key)).parent)

    def _download(self, key: str, path: Path, expected: str) -> None:
        try:
            with self._reaching(missing=None, absent=True):
                self._fs.get_file(self._path(key), str(path))
        except FileNotFoundError:
            raise Damaged(f"{self.url}/{key} is missing") from None
        _check(expected, _hash(path), f"{self.url}/{key}")
        sync(path)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _reaching(self, *, missing: str | None, absent: bool = False) -> Iterator[None]:
        """Turns whatever the file system's library raises into our words. What is not there is
        passed over, is `missing`, or, where `absent`, stays a FileNotFoundError."""
        try:
            yield
        except FileNotFoundError as error:
            if absent:
                raise
            if missing is not None:
                raise ArtifactsUnavailable(f"{self.url}: {missing} ({error})") from error
        except ArtifactsUnavailable:
            raise
        except Exception as error:
            if self._local and is_disk_full(error):
                raise ArtifactsUnavailable(f"the disk of {self.url} is full") from error
            if is_disk_full(error):
                raise
            said = str(error) or type(error).__name__
            raise ArtifactsUnavailable(f"the artifact store {self.url} fails: {said}") from error


@lru_cache(maxsize=4)
def artifact_store(url: str) -> ArtifactStore | None:
    """The process's store at this URL; None for an empty one: the run directories are the store."""
    return ArtifactStore(url) if url else None


def _names(manifest: Path, where: str) -> dict[str, str]:
    """Of a manifest: every file's name and hash."""
    with contextlib.suppress(OSError, ValueError):
        names = json.loads(manifest.read_text())
        if isinstance(names, dict) and all(PurePosixPath(name).name == name for name in names):
            return names
    raise Damaged(f"{where} has no {MANIFEST} that can be read")


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error


def _check(expected: str, found: str, where: str) -> None:
    if found != expected:
        raise Damaged(
            f"{where} is damaged: its SHA-256 is {found[:16]}…, not {expected[:16]}… as its "
            "manifest says"
        )
