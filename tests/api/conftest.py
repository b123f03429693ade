"""An application over a real SQLite database in a folder of its own, and a worker to feed it."""

from __future__ import annotations

import itertools
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from service.app import create_app
from service.settings import Settings
from service.store import Store
from service.store.migrate import upgrade
from tests.support.served import KEEPING
from tests.support.waiting import until

BRIDGE = {
    "method": "bridge",
    "model": "bridge-tiny",
    "data": {"prompts": "arithmetic", "demos": "arithmetic", "eval": "arithmetic"},
    "steps": 10,
}


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    """Who waits for the database's lock waits for whoever has it, however slow the disk is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.store.database.BUSY_SECONDS", 120)
        yield


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with all tables and no rows: copying it is quicker than making it."""
    file = tmp_path_factory.mktemp("migrated") / "bridge.db"
    upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture
def settings(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("BRIDGE_DATA_DIR", "BRIDGE_MODEL_DIR", "BRIDGE_ALLOWED_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Where this process stands still for a moment, a server that answers is not one out of reach.
    monkeypatch.setattr("service.generate.connections.CONNECT_SECONDS", 60.0)
    shutil.copy(migrated, tmp_path)
    # Nothing listens on port 1: tests that need inference start one of their own.
    return Settings(home=tmp_path, database_url="", inference_url="http://127.0.0.1:1")


def connect(settings: Settings) -> TestClient:
    """An application under an address that it answers at."""
    return TestClient(create_app(settings), base_url="http://127.0.0.1")


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with connect(settings) as client:
        yield client


@pytest.fixture
def store(client: TestClient) -> Store:
    return client.app.state.store  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def http(client: TestClient) -> Iterator[httpx.Client]:
    """The application on a real socket: only there does a stream stream."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(client.app, log_level="warning", lifespan="off", **KEEPING)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            yield http
        server.should_exit = True
        thread.join(120)


class Worker:
    """Does to the database what a worker does, as fast as a test wants."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seq = itertools.count(1)

    def claim(self, job_id: str) -> int:
        claim = self.store.claim(job_id, "worker-1", 60)
        assert claim is not None
        return claim.attempt

    def emit(self, job_id: str, attempt: int, *events: ev.Event) -> None:
        for event in events:
            event.seq, event.time = next(self._seq), 1_700_000_000.0
        self.store.append_events(job_id, attempt, events)

    def checkpoint(self, step: int, accuracy: float | None = None) -> ev.Checkpoint:
        return ev.Checkpoint(
            step=step,
            path=f"checkpoints/step-{step:06d}",
            adapter=f"adapters/step-{step:06d}",
            sha256="0" * 64,
            rank=16,
            accuracy=accuracy,
        )


@pytest.fixture
def worker(store: Store) -> Worker:
    return Worker(store)


@pytest.fixture
def job(store: Store) -> str:
    """A queued job's id."""
    return store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id


def problem(response: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The body of a refusal, checked to be a whole problem."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["detail"]
    assert body["type"] == f"urn:bridge:problem:{body['code']}"
    assert body["request_id"] == response.headers["x-request-id"]
    if code is not None:
        assert body["code"] == code, body
    return body


@pytest.fixture(scope="session")
def inference() -> Iterator[str]:
    """`python -m inference`; its address."""
    from tests.api.house import KEPT, inference_process

    with inference_process(BRIDGE_INFERENCE_MAX_ADAPTERS=str(KEPT)) as url:
        yield url


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters of bridge-tiny, `one` and `two`."""
    from tests.api.house import random_adapter

    return {
        name: random_adapter(tmp_path_factory.mktemp(name), seed)
        for seed, name in enumerate(("one", "two"))
    }
