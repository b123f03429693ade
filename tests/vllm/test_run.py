"""A whole run of the engine that samples from a real vLLM server."""

import os
import signal

import httpx
import pytest

from bridge_engine.events import EXIT_DONE, EXIT_FAILED
from tests.engine.test_run import SPEC, Engine
from tests.support.vllm_server import vllm_server
from tests.vllm.conftest import TINY

SAMPLED = {"rollout": {**SPEC["rollout"], "engine": "vllm"}}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose address the engine finds in its environment."""
    options = ("--enable-lora", "--max-lora-rank", "16")
    log = tmp_path / "vllm.log"
    with vllm_server(TINY, log, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as url:
        monkeypatch.setenv("BRIDGE_VLLM_URL", url)
        yield url


def adapters_on(url):
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    return [card["id"] for card in cards if card["parent"] is not None]


def test_a_run_samples_from_the_server_survives_its_death_and_the_servers(server, tmp_path):
    engine = Engine(tmp_path / "run", **SAMPLED)
    process = engine.start()
    engine.wait_for_step(process, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert adapters_on(server) != []

    status, output = engine.finish()
    assert status == EXIT_DONE, output
    assert any(e.type == "resume" and e.step >= 2 for e in engine.events())
    assert adapters_on(server) == []
    figures = engine.metrics()
    assert [row["step"] for row in figures] == list(range(9))
    for row in figures[1:]:
        assert row["vllm/probe"] < 1e-4
        # what the server says of its draws is what training computes of them
        assert row.get("logprob_drift", 0.0) < 1e-3
    assert any(row["frac_reward_zero_std"] < 1 for row in figures[1:])


def test_a_server_that_dies_fails_the_run_for_the_next_attempt_to_go_on(tmp_path, monkeypatch):
    options = ("--enable-lora", "--max-lora-rank", "16")
    with vllm_server(
        TINY, tmp_path / "vllm.log", *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"
    ) as url:
        monkeypatch.setenv("BRIDGE_VLLM_URL", url)
        engine = Engine(tmp_path / "run", **SAMPLED, steps=10_000)
        process = engine.start()
        engine.wait_for_step(process, 2)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_FAILED
    failure = engine.events()[-1]
    assert (failure.type, failure.category, failure.retryable) == ("error", "infra", True)
    assert failure.code in {"vllm_unreachable", "vllm_failed"}
    assert failure.step is not None
