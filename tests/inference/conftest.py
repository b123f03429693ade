"""The models of `house.py`, and a client of an application that serves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge_engine.errors import EngineError
from inference.app import create_app
from tests.inference.house import save_adapter, save_base, serving


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases (`plain`, `chatty`) and the adapters one, two (of plain) and other (of chatty)."""
    root = tmp_path_factory.mktemp("house")
    save_base(root / "plain", seed=1)
    save_base(root / "chatty", seed=2, chat=True)
    save_adapter(root / "plain", root / "one", 11, "plain")
    save_adapter(root / "plain", root / "two", 12, "plain", rank=6)
    save_adapter(root / "chatty", root / "other", 13, "chatty")
    return root


@pytest.fixture
def client(house: Path) -> Any:
    def materialize(name: str) -> Path:
        if name not in ("plain", "chatty"):
            raise EngineError(f"no model {name!r}", code="unknown_model", param="model")
        return house / name

    with serving(create_app(materialize, device="cpu")) as client:
        yield client
