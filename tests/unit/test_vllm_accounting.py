"""What the client of a vLLM server believes to be loaded there, over a fake of its surface."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from service.errors import ApiError
from service.generate.backend import loaded_name
from service.generate.vllm import VllmBackend
from service.store import AdapterRow
from tests.support.fake_vllm import FakeVllm


class Line(VllmBackend):
    """A client whose line leads to the fake: slowly, not at all, or with answers that wait for
    `deliver`."""

    def __init__(self, vllm: FakeVllm, most: int = 32) -> None:
        super().__init__("http://vllm", most=most)
        self._inner = httpx.AsyncClient(
            transport=httpx.ASGITransport(vllm.app), base_url="http://vllm"
        )
        self._vllm = vllm
        self.cut = False
        self.deliver: asyncio.Event | None = None
        self.held = asyncio.Event()
        """An answer waits."""
        self.most = 0

    async def _request(self, method: str, path: str, body: Any, seconds: float) -> Any:
        if self.cut:
            raise aiohttp.ClientConnectionError("refused")
        deliver = self.deliver
        await asyncio.sleep(0.001)
        response = await self._inner.request(method, path, json=body)
        self.most = max(self.most, len(self._vllm.adapters))
        if deliver is not None:
            self.held.set()
            await deliver.wait()
        return Answer(response)


class Answer:
    """As aiohttp has it."""

    def __init__(self, response: httpx.Response) -> None:
        self.status, self.headers = response.status_code, response.headers
        self._content = response.content

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        return self._content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    return tmp_path


def adapter(step: int) -> AdapterRow:
    sha256 = hashlib.sha256(str(step).encode()).hexdigest()
    return AdapterRow(name=f"job_x@{step}", sha256=sha256, rank=1, base_model="bridge-tiny")


def name(step: int) -> str:
    return loaded_name(adapter(step))


def load(backend: VllmBackend, folder: Path, step: int) -> Coroutine[Any, Any, None]:
    return backend.load(name(step), folder, adapter(step))


def test_no_more_are_loaded_than_are_kept_however_many_are_loaded_at_once(folder: Path) -> None:
    vllm = FakeVllm("bridge-tiny")
    line = Line(vllm, most=4)

    async def at_once() -> None:
        await asyncio.gather(*(load(line, folder, step) for step in range(40)))

    asyncio.run(at_once())
    assert line.most <= 4
    assert len(vllm.adapters) == 4


def test_what_left_while_a_look_was_on_its_way_is_not_taken_over_again(folder: Path) -> None:
    vllm = FakeVllm("bridge-tiny")
    backend = line = Line(vllm, most=2)

    async def look_meanwhile() -> None:
        for step in (1, 2):
            await load(backend, folder, step)
        deliver = line.deliver = asyncio.Event()
        look = asyncio.create_task(backend.loaded())
        await line.held.wait()  # the server has answered; we have not heard yet
        line.deliver = None
        await load(backend, folder, 3)
        deliver.set()
        await look
        vllm.restart()
        await backend.loaded()
        assert backend.lost() == [name(2), name(3)]

    asyncio.run(look_meanwhile())


def test_a_server_that_was_away_must_prove_all_that_it_has(folder: Path) -> None:
    backend = line = Line(FakeVllm("bridge-tiny"))

    async def away() -> None:
        await load(backend, folder, 1)
        backend.proved |= {name(1), "job_x@80"}
        line.cut = True
        with pytest.raises(ApiError, match="cannot be reached"):
            await backend.loaded()
        assert backend.proved == set()

    asyncio.run(away())


def test_what_another_service_let_go_is_not_lost_and_what_a_restart_took_is(folder: Path) -> None:
    vllm = FakeVllm("bridge-tiny")
    backend = line = Line(vllm)

    async def both() -> None:
        for step in (1, 2, 3):
            await load(backend, folder, step)
        del vllm.adapters[name(1)]
        await backend.loaded()
        assert backend.lost() == []
        line.cut = True
        with pytest.raises(ApiError):
            await backend.loaded()
        line.cut = False
        del vllm.adapters[name(2)]  # another service has brought back the other already
        await backend.loaded()
        assert backend.lost() == [name(2)]
        await load(backend, folder, 2)
        assert backend.lost() == []

    asyncio.run(both())
