"""Where it listens, by which names it answers, and what keeps it from starting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference.app import create_app
from tests.inference.house import (
    loaded,
    serving,
)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", ""]
)
def test_a_request_by_a_foreign_host_name_is_refused(client: Any, house: Path, host: str) -> None:
    body = {"lora_name": "J@1", "lora_path": str(house / "one")}
    for method, path in (("POST", "/v1/load_lora_adapter"), ("GET", "/v1/models"), ("GET", "/no")):
        refused = client.request(method, path, json=body, headers={"Host": host})
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "BRIDGE_ALLOWED_HOSTS" in error["message"]
    assert loaded(client) == set(), "nothing was done"


def test_a_request_that_a_foreign_page_sends_is_refused(client: Any) -> None:
    for origin in ("https://evil.example", "http://evil.example:8001", "null", ""):
        assert client.get("/health", headers={"Origin": origin}).status_code == 403
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:8000"):
        assert client.get("/health", headers={"Origin": origin}).status_code == 200


def test_own_host_names_are_answered(house: Path) -> None:
    app = create_app(
        lambda name: house / name, device="cpu", hosts=["Inference", "::2", "10.0.0.5"]
    )
    with serving(app) as client:
        for host in ("localhost", "127.0.0.1:8001", "[::1]:8001", "[::1]", "LOCALHOST:1"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("inference:8001", "[::2]:8001", "10.0.0.5:8001"):
            assert client.get("/health", headers={"Host": host}).status_code == 200


def test_listening_everywhere_it_answers_to_its_own_networks_names_alone(house: Path) -> None:
    app = create_app(lambda name: house / name, device="cpu", hosts=["0.0.0.0"])
    with serving(app) as client:
        for host in ("inference:8001", "192.168.0.7:8001", "[fd00::1]:8001", "localhost"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example:8001", "192.168.0.7.evil.example", ""):
            assert client.get("/health", headers={"Host": host}).status_code == 403
        page = {"Host": "0.0.0.0:8001", "Origin": "http://evil"}
        assert client.get("/health", headers=page).status_code == 403


def _start(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inference", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_taken_port_is_one_sentence_and_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = _start("--port", str(port))
    assert result.returncode == 2
    assert str(port) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_listens_on_loopback_only() -> None:
    result = _start("--host", "0.0.0.0", BRIDGE_ALLOW_UNAUTHENTICATED="")
    assert result.returncode == 2
    assert "loopback" in result.stderr


def test_a_limit_below_one_is_one_sentence_and_status_2() -> None:
    result = _start("--port", "0", BRIDGE_INFERENCE_MAX_MODELS="0")
    assert result.returncode == 2
    assert "BRIDGE_INFERENCE_MAX_MODELS" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_all_that_is_wrong_with_the_settings_is_told_at_once() -> None:
    wrong = {"ROWS": "0", "THREADS": "abc", "MEMORY_GB": "nan", "PORT": "-1"}
    result = _start(**{f"BRIDGE_INFERENCE_{name}": value for name, value in wrong.items()})
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(wrong)
    for name, value in wrong.items():
        assert any(f"BRIDGE_INFERENCE_{name} must be" in n and value in n for n in lines)


def test_a_port_that_none_can_be_is_one_sentence_and_status_2() -> None:
    result = _start("--port", "99999")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
