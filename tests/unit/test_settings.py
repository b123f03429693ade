"""Settings: defaults that work, paths that mean the same in every process, clear refusals."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.settings import Settings, explain
from worker.process import OURS


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BRIDGE_"):
            monkeypatch.delenv(name)


def test_everything_lies_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    home = tmp_path / ".bridge"
    assert settings.home == home
    assert settings.database_url == f"sqlite:///{home}/bridge.db"
    assert settings.datasets_dir == home / "datasets"
    assert settings.run_dir("job_1") == home / "runs" / "job_1"


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRIDGE_HOME", "here")
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", "there")
    settings = Settings()
    monkeypatch.chdir("/")
    assert (settings.home, settings.datasets_dir) == (tmp_path / "here", tmp_path / "there")


def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRIDGE_HOME", "BRIDGE_PORT", "BRIDGE_DATABASE_URL", "BRIDGE_ENGINE_COMMAND"):
        monkeypatch.setenv(name, "")
    settings = Settings()
    assert settings.home.name == ".bridge"
    assert settings.port == 8000
    assert settings.engine_command == [sys.executable, "-m", "bridge_engine"]


@pytest.mark.parametrize("given", ['python -m "my engine"', '["python", "-m", "my engine"]'])
def test_engine_command_is_words_or_json(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_ENGINE_COMMAND", given)
    assert Settings().engine_command == ["python", "-m", "my engine"]


def test_no_secret_of_the_service_is_handed_to_the_engine() -> None:
    fields = Settings.model_fields.items()
    secrets = {f"BRIDGE_{name}".upper() for name, of in fields if of.annotation is SecretStr}
    assert secrets
    assert secrets <= set(OURS)


def test_several_inference_servers_are_for_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_INFERENCE_URL", "http://a:1, http://b:2/,http://a:1")
    with pytest.raises(ValidationError, match="several are for vllm"):
        Settings()
    monkeypatch.setenv("BRIDGE_INFERENCE_BACKEND", "vllm")
    assert Settings().inference_urls == ["http://a:1", "http://b:2"]
    monkeypatch.setenv("BRIDGE_INFERENCE_URL", "http://a:1,b:2")
    with pytest.raises(ValidationError, match="an address such as"):
        Settings()


@pytest.mark.parametrize(
    "url", ["http://u:hunter2@a:1", "http://b:2,https://hunter2@a", "http://u:h/hunter2@a"]
)
def test_credentials_in_an_inference_url_are_refused_and_not_repeated(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses are told in logs and answers."""
    monkeypatch.setenv("BRIDGE_INFERENCE_BACKEND", "vllm")
    monkeypatch.setenv("BRIDGE_INFERENCE_URL", url)
    with pytest.raises(ValidationError) as refused:
        Settings()
    told = explain(refused.value)
    assert told.startswith("BRIDGE_INFERENCE_URL: ")
    assert "BRIDGE_INFERENCE_API_KEY" in told
    assert "hunter2" not in told


def test_a_lease_shorter_than_two_heartbeats_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least twice BRIDGE_HEARTBEAT_SECONDS"):
        Settings(lease_seconds=5, heartbeat_seconds=3)


def test_mistakes_are_told_by_the_variables_name_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BRIDGE_PORT", "eighty")
    monkeypatch.setenv("BRIDGE_DATABASE_URL", "mysql://user:secret@host/db")
    with pytest.raises(ValidationError) as refused:
        Settings()
    told = explain(refused.value)
    assert "BRIDGE_PORT: Input should be a valid integer" in told
    assert "BRIDGE_DATABASE_URL: 'mysql' is not a database Bridge can use" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://bridge:x@hunter2@host:5432/db",  # an @ in the password
        "postgresql://bridge:hunter2@host:port/db",
        "postgresql:/bridge:hunter2@host/db",
        "bridge:hunter2@host/db",
        "postgresql+hunter2://host/db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://hunter2/bridge.db",
    ],
)
def test_malformed_database_url_is_one_sentence_without_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_DATABASE_URL", url)
    with pytest.raises(ValidationError) as refused:
        Settings()
    told = explain(refused.value)
    assert told.startswith("BRIDGE_DATABASE_URL: ")
    assert "postgresql://USER:PASSWORD@HOST:PORT/NAME" in told
    assert len(told.splitlines()) == 1
    assert "hunter2" not in told.replace("'postgresql+hunter2'", "")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////var/lib/bridge.db",
        "postgres://host/db",
        "postgresql:///db",
        "postgresql+psycopg://bridge:p%40ss@[::1]:5432/db?sslmode=require",
    ],
)
def test_database_url_that_can_be_used_is_kept(url: str) -> None:
    assert Settings(database_url=url).database_url == url


def test_allowed_hosts_are_a_comma_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_ALLOWED_HOSTS", "api, Bridge.Example.org ,::1")
    assert Settings().allowed_hosts == ["api", "bridge.example.org", "::1"]
    for wrong in ("*", "http://api", "api:8000"):
        monkeypatch.setenv("BRIDGE_ALLOWED_HOSTS", wrong)
        with pytest.raises(ValidationError, match="is not a host"):
            Settings()
