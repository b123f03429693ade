"""A mistyped setting is told, with the right one, and docs/settings.md has them all."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from service import variables
from service.settings import get_settings
from service.variables import ELSEWHERE, PAGE, known, unknown
from worker import __main__ as worker

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("BRIDGE_LEASE_SECOND", "BRIDGE_LEASE_SECONDS"),
        ("BRIDGE_PROJEKT", "BRIDGE_PROJECT"),
        ("BRIDGE_MODELS_DIR", "BRIDGE_MODEL_DIR"),
        ("BRIDGE_VLLM_WEIGHT", "BRIDGE_VLLM_WEIGHTS"),
        ("BRIDGE_INFERENCE_ROW", "BRIDGE_INFERENCE_ROWS"),
        ("BRIDGE_QQQQ", None),
    ],
)
def test_a_mistyped_variable_is_told_with_the_nearest(given: str, meant: str | None) -> None:
    (sentence,) = unknown([given, "PATH", "BRIDGE_HOME", "BRIDGE_VLLM_URL", "BRIDGE_UP_FD"])
    assert sentence.startswith(f"{given} is not a setting")
    assert sentence.endswith(f"; did you mean {meant}?") or meant is None
    assert ("did you mean" in sentence) is (meant is not None)


def test_every_variable_that_is_read_anywhere_is_known() -> None:
    packages = ("service", "worker", "inference", "bridge_client", "bridge_engine", "bridge_http")
    pages = [page for package in packages for page in (ROOT / package).rglob("*.py")]
    pages += [ROOT / "docker-compose.yml", ROOT / "Dockerfile"]
    read = {
        name
        for page in pages
        for name in re.findall(r"[\"{ ](BRIDGE_[A-Z_]*[A-Z])[\":}=]", page.read_text())
    }
    assert len(read) > 30
    assert unknown(read - {"BRIDGE_TINY"}) == []  # a name in Python


def test_none_is_described_twice_and_the_page_has_them_all() -> None:
    assert PAGE.read_text() == variables.page(), "python -m service.variables"
    rows = re.findall(r"^\| `(BRIDGE_\w+)` \|.*\S \|$", variables.page(), re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == known()
    assert len(ELSEWHERE) == 5


def test_a_worker_tells_of_a_mistyped_variable_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.local.run_local", lambda *_: None)
    monkeypatch.setattr("worker.log.setup", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("BRIDGE_HOME", str(tmp_path))
    monkeypatch.setenv("BRIDGE_LEASE_SECOND", "3")
    get_settings.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert worker.main([]) == 0
    finally:
        get_settings.cache_clear()
    assert "did you mean BRIDGE_LEASE_SECONDS?" in caplog.text
