"""An adapter's archive on its way to the disk: nothing lies there under its name until it is known
to be what the service sent."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
import zipfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import httpx

from bridge_client.errors import BridgeError


class Download:
    """Leaving the `with` block removes what did not arrive whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None

    def begin(self, response: httpx.Response) -> None:
        """A try: what came before it is removed."""
        self._remove()
        name = re.search(r'filename="([\w.@-]+)"', response.headers.get("content-disposition", ""))
        self._path = self._folder / (name.group(1) if name else "adapter.zip")
        self._draft = self._folder / f".{self._path.name}.{uuid.uuid4().hex}.part"
        self._expected = _expected(response)
        self._digest = hashlib.sha256()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._draft.open("xb")

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._file is not None:
            self._file.close()
            self._draft.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Takes a piece in."""
        assert self._file is not None
        self._digest.update(chunk)
        self._file.write(chunk)

    def finish(self, unpack: bool) -> Path:
        """The archive, or the folder it was unpacked into. Raises BridgeError if it is not what the
        service said it would send."""
        assert self._file is not None
        self._file.close()
        found = self._digest.hexdigest()
        if found != self._expected:
            raise BridgeError(
                f"{self._path.name} did not arrive as it was sent: its SHA-256 is {found[:16]}…, "
                f"not {self._expected[:16]}…; nothing was kept, download it again"
            )
        if not unpack:
            os.replace(self._draft, self._path)
            return self._path
        folder = self._path.with_suffix("")
        with zipfile.ZipFile(self._draft) as archive:
            archive.extractall(folder)
        return folder


def _expected(response: httpx.Response) -> str:
    """The SHA-256 that the answer announces (RFC 9530), in hexadecimal."""
    digest = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", response.headers.get("repr-digest", ""))
    if digest is None:
        raise BridgeError("the service did not say what it sends (no Repr-Digest); update it")
    return base64.b64decode(digest.group(1)).hex()
