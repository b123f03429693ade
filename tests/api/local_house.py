"""The gateway in front of the real inference process, for the tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.settings import Settings
from service.store import Store
from tests.api.conftest import connect
from tests.api.house import House

PROMPT = "12+3-5?"


@pytest.fixture
def client(settings: Settings, inference: str) -> Iterator[TestClient]:
    served = settings.model_copy(update={"inference_url": inference})
    with connect(served) as client:
        yield client


@pytest.fixture
def house(settings: Settings, store: Store, weights: dict[str, Path]) -> House:
    return House(settings, store, weights)


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12} | body)


def text(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])
