"""A whole embedded service: `bridge up --detach` on a free port, in a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bridge_client import Client
from bridge_client.home import Home, State
from tests.support.ports import port_of_a_house

ROOT = Path(__file__).parents[2]

SPEC: dict[str, Any] = {
    "method": "bridge",
    "data": {
        "prompts": "arithmetic/train",
        "demos": {"name": "arithmetic", "split": "demos", "limit": 16},
        "eval": {"name": "arithmetic", "split": "dev", "limit": 10},
    },
    "steps": 4,
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 24},
    "sft": {"batch_size": 2},
    "eval": {"every": 0},
    "checkpoint": {"every": 2},
}
"""A job of a few seconds."""


@dataclass(frozen=True)
class House:
    """One embedded service and the means to speak to it."""

    home: Home
    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state(self) -> State:
        state = self.home.running()
        assert state is not None, self.home.tail("bridge", 50)
        return state

    def bridge(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """One `bridge …` in this home, as a user would type it."""
        return subprocess.run(
            [sys.executable, "-m", "bridge_client.cli", *arguments],
            env=self.environment,
            cwd=self.home.path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def up(self) -> None:
        done = self.bridge("up", "--detach", "--port", str(self.port))
        logs = "\n".join(self.home.tail(name) for name in ("service", "worker", "inference"))
        assert done.returncode == 0, done.stdout + done.stderr + logs

    def down(self) -> None:
        done = self.bridge("down")
        assert done.returncode == 0, done.stdout + done.stderr


def make_house(path: Path) -> House:
    """A home behind a proxy that never answers: what runs on one machine must not need it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
    for name in ("NO_PROXY", "no_proxy"):
        environment.pop(name, None)
    environment |= {
        **dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9"),
        "BRIDGE_HOME": str(path),
        "BRIDGE_RECONCILE_SECONDS": "1",
        "BRIDGE_RETRY_SECONDS": "0.5",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "NO_COLOR": "1",
    }
    home = Home(path)
    home.create()
    return House(home, port_of_a_house(), environment)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Up for the tests of one file, down after them."""
    house = make_house(tmp_path_factory.mktemp("bridge"))
    try:
        house.up()
        yield house
    finally:
        house.down()


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with Client(house.url) as client:
        yield client
