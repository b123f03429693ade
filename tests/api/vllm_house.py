"""The gateway in front of a fake vLLM, for the tests of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.generate import controller
from service.generate import vllm as vllm_backend
from service.generate.vllm import VllmBackend
from service.settings import Settings
from service.store import AdapterRow
from tests.api.house import House, Service
from tests.support.fake_vllm import CANARY, FakeVllm, logprobs_of
from tests.support.served import Served

KEY = "a key of vLLM's"
KEPT = 2


@pytest.fixture
def vllm() -> FakeVllm:
    return FakeVllm("bridge-tiny", key=KEY)


@pytest.fixture
def served(
    settings: Settings, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings with the server. It shares a process with the service, and on a busy machine a look
    at what it has may take seconds: here that never means that it is silent."""
    monkeypatch.setattr(controller, "EVERY_SECONDS", 3600.0)  # only a change is a reason to look
    monkeypatch.setattr(VllmBackend, "look_seconds", 60.0)
    monkeypatch.setattr(vllm_backend, "_PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr("service.generate.connections.IDLE_SECONDS", 3600.0)
    with Served(vllm.app) as server:
        yield settings_for(settings, server.url)


@pytest.fixture
def service(served: Settings) -> Iterator[Service]:
    with Service(served) as service:
        yield service


@pytest.fixture
def house(settings: Settings, service: Service, weights: dict[str, Path]) -> House:
    return House(settings, service.store, weights)


def settings_for(settings: Settings, *urls: str, **more: Any) -> Settings:
    changes = {
        "inference_backend": "vllm",
        "inference_url": ",".join(urls),
        "inference_api_key": KEY,
        "inference_max_adapters": KEPT,
        "home": settings.home,
        "database_url": settings.database_url,
    }
    return Settings(**(changes | more))


def save(house: House, step: int, name: str, **more: Any) -> str:
    """Registers an adapter with its canary; the digest of its weights, which the fake answers."""
    folder = house.save(step, name, **more)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    card = json.loads((folder / "bridge.json").read_text())
    card |= {"canary": {**CANARY, "logprobs": logprobs_of(digest)}, "end_tokens": [2, 3]}
    (folder / "bridge.json").write_text(json.dumps(card))
    return digest


def many(house: House, count: int) -> list[str]:
    """Adapters of steps 1 to `count`, each with bytes of its own; their digests."""
    for number in range(1, count + 1):
        copy = house.weights["one"].with_name(f"made{number}")
        shutil.copytree(house.weights["one"], copy, dirs_exist_ok=True)
        file = copy / "adapter_model.safetensors"
        content = (house.weights["one"] / file.name).read_bytes()
        file.write_bytes(content[:-4] + number.to_bytes(4, "little"))
        house.weights[f"made{number}"] = copy
    return [save(house, number, f"made{number}") for number in range(1, count + 1)]


def ask(service: Service, **body: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/generate", json={"prompt": "1+1?"} | body, timeout=120)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def row(house: House, step: int) -> AdapterRow:
    return house.store.adapter(f"{house.job}@{step}")


def asked(vllm: FakeVllm, path: str) -> list[dict[str, Any]]:
    return [body for at, body in vllm.asked if at == path]


def reconcile(service: Service) -> None:
    """One look of the controller."""
    app = service.app
    asyncio.run_coroutine_threadsafe(
        app.state.controller.reconcile(), app.state.controller._loop
    ).result(120)
