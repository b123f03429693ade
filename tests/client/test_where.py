"""Where the client looks for the service, and which way it takes there."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from bridge_client import (
    AsyncClient,
    Client,
    _given,
)
from bridge_client.home import Home, Process, State
from tests.client.flaky import flaky, say

JOB = json.dumps({"id": "job_1", "status": "queued", "method": "sft", "steps": 5, "new_field": 1})


def test_the_sdk_finds_the_service_as_the_command_line_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """BRIDGE_URL; else what runs in BRIDGE_HOME or ./.bridge; else port 8000."""
    home = Home(tmp_path / ".bridge")
    home.create()
    home.write(State("http://127.0.0.1:8123", "http://x", Process.of(os.getpid()), {}, True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRIDGE_HOME", raising=False)
    monkeypatch.setenv("BRIDGE_URL", "http://elsewhere:1/")
    assert Client().base_url == "http://elsewhere:1"
    monkeypatch.delenv("BRIDGE_URL")
    assert Client().base_url == "http://127.0.0.1:8123"
    assert AsyncClient().base_url == "http://127.0.0.1:8123"
    monkeypatch.setenv("BRIDGE_HOME", str(tmp_path / "empty"))
    assert Client().base_url == "http://127.0.0.1:8000"
    monkeypatch.setenv("BRIDGE_HOME", str(tmp_path / ".bridge"))
    monkeypatch.chdir("/")
    assert Client().base_url == "http://127.0.0.1:8123"


PROXIES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def _proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there


@pytest.mark.usefixtures("_proxied")
def test_a_service_on_this_machine_is_reached_past_any_proxy() -> None:
    async def ask(url: str) -> str:
        async with AsyncClient(url) as client:
            return (await client.job("job_1")).id

    with flaky(say(200, JOB)) as server:
        with Client(server.url) as client:
            assert client.job("job_1").id == "job_1"
        with Client(server.url.replace("127.0.0.1", "localhost")) as client:
            assert client.job("job_1").id == "job_1"
        assert asyncio.run(ask(server.url)) == "job_1"


def test_a_remote_service_is_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with flaky(say(200, JOB)) as proxy:
        for name in PROXIES:
            monkeypatch.setenv(name, proxy.url)
        with Client("http://bridge.example.org") as client:
            assert client.job("job_1").id == "job_1"
    assert proxy.requests[0][1].startswith("http://bridge.example.org/")


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.8.8", True),
        ("http://localhost:1", True),
        ("http://[::1]:8000", True),
        ("http://127.0.0.1.example.org", False),
        ("http://10.0.0.1", False),
        ("https://bridge.example.org", False),
    ],
)
def test_loopback_is_told_from_the_address_alone(url: str, here: bool) -> None:
    assert _given.is_loopback(url) is here
