"""An adapter's download: verified on arrival, or nothing is kept."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import zipfile
from pathlib import Path

import httpx
import pytest

from bridge_client import AsyncClient, BridgeError, Client, _core

_archive = io.BytesIO()
with zipfile.ZipFile(_archive, "w") as _zip:
    _zip.writestr("adapter_config.json", "{}")
ARCHIVE = _archive.getvalue()
DIGEST = base64.b64encode(hashlib.sha256(ARCHIVE).digest()).decode()


def service(*bodies: bytes | Exception) -> httpx.MockTransport:
    """Answers each request for the archive with the next of these bodies."""
    waiting = list(bodies)

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/adapters/job_1@best/download"
        body = waiting.pop(0)
        if isinstance(body, Exception):
            raise body
        headers = {
            "Repr-Digest": f"sha-256=:{DIGEST}:",
            "Content-Disposition": 'attachment; filename="job_1-step-5.zip"',
        }
        return httpx.Response(200, content=body, headers=headers)

    return httpx.MockTransport(answer)


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "jittered", lambda delay: 0.01)


def test_what_arrives_whole_is_kept_as_an_archive_or_as_a_folder(tmp_path: Path) -> None:
    with Client("http://x", transport=service(ARCHIVE, ARCHIVE)) as client:
        path = client.download_adapter("job_1@best", tmp_path / "new")
        assert path == tmp_path / "new" / "job_1-step-5.zip"
        assert path.read_bytes() == ARCHIVE
        folder = client.download_adapter("job_1@best", tmp_path, unpack=True)
    assert folder == tmp_path / "job_1-step-5"
    assert [p.name for p in folder.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("body", [ARCHIVE[:-1], ARCHIVE.replace(b"{}", b"[]")])
def test_other_bytes_than_were_announced_are_refused_and_not_kept(
    tmp_path: Path, body: bytes
) -> None:
    with (
        Client("http://x", transport=service(body)) as client,
        pytest.raises(BridgeError, match="did not arrive as it was sent"),
    ):
        client.download_adapter("job_1@best", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_is_tried_again_by_both_clients(tmp_path: Path) -> None:
    async def download() -> Path:
        transport = service(httpx.ReadError("cut"), ARCHIVE)
        async with AsyncClient("http://x", transport=transport) as client:
            return await client.download_adapter("job_1@best", tmp_path)

    with Client("http://x", transport=service(httpx.ReadError("cut"), ARCHIVE)) as client:
        assert client.download_adapter("job_1@best", tmp_path).read_bytes() == ARCHIVE
    assert asyncio.run(download()).read_bytes() == ARCHIVE
