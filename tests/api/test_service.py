"""What holds for every route: problems, request ids, health, figures, the description, no torch."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.__main__ import main
from service.settings import Settings, get_settings
from service.store import Store, database
from tests.api.conftest import BRIDGE, connect, problem
from tests.support.ports import free_port


def test_callers_request_id_is_kept_where_it_is_fit_for_a_log(client: TestClient) -> None:
    response = client.get("/jobs/job_x", headers={"X-Request-Id": "trace-42"})
    assert problem(response, 404)["request_id"] == "trace-42"
    for unfit in ("two words", "x" * 200, 'quote"'):
        answer = client.get("/healthz", headers={"X-Request-Id": unfit})
        assert answer.headers["x-request-id"].startswith("req_")
    ids = {client.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_unforeseen_error_is_500_without_its_inside_and_logged_with_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Store, job_id: str) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(Store, "get_job", broken)
    with caplog.at_level(logging.ERROR):
        body = problem(client.get("/jobs/job_x"), 500, "internal")
    assert "hunter2" not in json.dumps(body)
    assert "hunter2" in caplog.text
    assert body["request_id"] in caplog.text


def test_unknown_path_and_wrong_method_are_problems(client: TestClient) -> None:
    problem(client.get("/nothing"), 404, "unknown_path")
    response = client.delete("/jobs")
    body = problem(response, 405, "method_not_allowed")
    assert response.headers["allow"]
    assert "DELETE" in body["detail"]


def test_health_needs_nothing_and_readiness_needs_the_database(
    client: TestClient, store: Store, tmp_path: Path
) -> None:
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"] == {"database": "ok", "inference": "unreachable"}
    store.close()
    for file in tmp_path.glob("bridge.db*"):
        file.unlink(missing_ok=True)  # who closes the database last takes some along
    broken = client.get("/readyz")
    assert broken.status_code == 503
    assert "migrate" in broken.json()["checks"]["database"]
    assert client.get("/healthz").json() == {"status": "ok"}


def test_tables_of_another_version_are_not_ready(client: TestClient, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "bridge.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'of another time'")
    database.close()
    body = client.get("/readyz")
    assert body.status_code == 503
    assert "python -m service migrate" in body.json()["checks"]["database"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_answers_head_as_it_answers_get(client: TestClient, path: str) -> None:
    response = client.head(path)
    assert response.status_code == 200
    assert response.content == b""


def test_bare_address_leads_to_the_documentation(client: TestClient) -> None:
    for response in (client.get("/", follow_redirects=False), client.head("/")):
        response = response.history[0] if response.history else response
        assert response.headers["location"] == "/docs"
    assert client.get("/").status_code == 200


def test_trouble_is_told_in_full_on_loopback_and_without_places_elsewhere(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in tmp_path.glob("bridge.db*"):
        file.unlink(missing_ok=True)  # who closes the database last takes some along
    (tmp_path / "bridge.db").mkdir()  # cannot be opened, and the message says where it lies
    ask = {"model": "bridge-tiny", "prompt": "1"}
    for host, told in (("127.0.0.1", True), ("0.0.0.0", False)):
        with connect(settings.model_copy(update={"host": host})) as client:
            answers = [
                client.get("/jobs"),
                client.post("/jobs", json=BRIDGE),
                client.get("/readyz"),
                client.post("/generate", json=ask),
            ]
        assert [answer.status_code for answer in answers] == [503] * 4
        for answer in answers[:3]:
            assert (str(tmp_path) in answer.text) is told
        assert ("127.0.0.1:1" in answers[3].text) is told
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("/jobs?limt=3", "limit"),
        ("/jobs/{job}/metrics?key=reward", "keys"),
        ("/jobs/{job}/samples?steps=3", "step"),
        ("/jobs/{job}/events?afer=3", "after"),
        ("/adapters?job=x", "job_id"),
        ("/datasets?afterr=x", "after"),
        ("/jobs/{job}?verbose=1", None),
    ],
)
def test_unknown_query_parameter_is_422_with_the_nearest(
    client: TestClient, job: str, path: str, nearest: str | None
) -> None:
    body = problem(client.get(path.format(job=job)), 422, "unknown_parameter")
    assert body["param"] == path.partition("?")[2].partition("=")[0]
    assert body.get("nearest") == nearest


def test_misspelt_dry_run_queues_nothing(client: TestClient, store: Store) -> None:
    body = problem(client.post("/jobs?dryrun=true", json=BRIDGE), 422, "unknown_parameter")
    assert body["nearest"] == "dry_run"
    assert store.list_jobs()[0] == []


@pytest.mark.parametrize("path", ["/jobs", "/datasets", "/adapters", "/jobs/{job}/samples"])
@pytest.mark.parametrize("after", ["nothing", "9" * 30, "é", "1"])
def test_unknown_cursor_is_404_in_every_list(
    client: TestClient, job: str, path: str, after: str
) -> None:
    body = problem(client.get(path.format(job=job), params={"after": after}), 404)
    assert (body["param"], body["given"]) == ("after", after)


def test_figures_count_requests_by_route_and_jobs_by_status(
    client: TestClient, store: Store, job: str
) -> None:
    client.get(f"/jobs/{job}")
    client.get("/jobs/job_other")
    store.request_cancel(job)
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    requests = 'bridge_http_requests_total{method="GET",route="/jobs/{job_id}",status="%s"}'
    assert lines[requests % 200] == lines[requests % 404] == "1.0"
    assert lines['bridge_jobs{status="cancelled"}'] == "1.0"
    assert lines['bridge_jobs{status="queued"}'] == "0.0"
    assert job not in text


# --------------------------------------------------------------------------- the description


def test_description_is_whole_and_fit_for_client_generators(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    schemas = document["components"]["schemas"]
    references = _references(document)
    assert references
    assert {ref.removeprefix("#/components/schemas/") for ref in references} <= set(schemas)
    for path, method, operation in operations:
        assert operation["summary"], (path, method)
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                kind = "application/json" if path.startswith("/v1/") else "application/problem+json"
                assert list(answer.get("content", {kind: {}})) == [kind], (path, method, status)
    assert "HTTPValidationError" not in json.dumps(document["paths"])


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_references(item) for item in value.values()))
    return set().union(*(_references(item) for item in value)) if isinstance(value, list) else set()


def test_every_example_of_a_job_is_accepted(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert set(body["examples"]) == {"sft", "rl", "bridge", "eval"}
    for name, example in body["examples"].items():
        response = client.post("/jobs", json=example["value"])
        assert response.status_code == 201, (name, response.text)


# --------------------------------------------------------------------------- the process


def _run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


def test_nothing_the_service_does_loads_torch(tmp_path: Path) -> None:
    code = f"""
import json, sys
from fastapi.testclient import TestClient
from service.app import create_app
from service.__main__ import main
from service.settings import Settings, get_settings
from service.store.migrate import upgrade
settings = Settings(home={str(tmp_path)!r}, inference_url="http://127.0.0.1:1")
upgrade(settings.database_url)
with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
    row = b'{{"problem": "2+3?", "answer": "5"}}'
    assert client.post("/jobs", json={BRIDGE!r}).status_code == 201
    assert client.post("/datasets", content=row).status_code == 201
    ask = {{"model": "bridge-tiny", "prompt": "1"}}
    assert client.post("/generate", json=ask).status_code == 503
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    result = _run(code)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Starts the service with these settings; returns the one sentence it refuses to start with."""

    def start(**env: str) -> str:
        settings = {"BRIDGE_HOME": str(tmp_path), "BRIDGE_DATABASE_URL": "", "BRIDGE_PORT": "0"}
        for name, value in (settings | env).items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        monkeypatch.setattr("service.__main__._serve", lambda *_: pytest.fail("it started"))
        assert main([]) == 2
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1, said
        return said

    yield start
    get_settings.cache_clear()


def test_taken_port_is_one_sentence_and_status_2(refused: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(BRIDGE_PORT=port)
    assert port in said
    assert "set BRIDGE_PORT" in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_address_that_others_can_reach_is_refused_without_keys(
    refused: Callable[..., str], host: str
) -> None:
    assert "loopback only" in refused(BRIDGE_HOST=host)


def test_locked_database_is_one_sentence_and_status_2(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    locked = sqlite3.connect(tmp_path / "bridge.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    try:
        said = refused()
    finally:
        locked.close()
    assert "bridge.db" in said
    assert "locked" in said


def test_home_that_cannot_be_made_is_one_sentence_and_status_2(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "BRIDGE_HOME" in refused(BRIDGE_HOME=str(tmp_path / "file" / "home"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BRIDGE_PORT", "many"),
        ("BRIDGE_LEASE_SECONDS", "1"),
        ("BRIDGE_DATABASE_URL", "nonsense"),
        ("BRIDGE_DATABASE_URL", "mysql://host/db"),
        ("BRIDGE_DATABASE_URL", "postgresql://bridge:pass@word@host:5432/db"),
        ("BRIDGE_DATABASE_URL", "postgresql+psycopg2://host/db"),
        ("BRIDGE_DATABASE_URL", "postgresql://127.0.0.1:1/db?colour=blue"),
        ("BRIDGE_DATABASE_URL", "sqlite://"),
        ("BRIDGE_ALLOWED_HOSTS", "https://bridge.example.org"),
        ("BRIDGE_MAX_UPLOAD_BYTES", "-1"),
        ("BRIDGE_INFERENCE_URL", "not a url"),
    ],
)
def test_wrong_setting_is_one_sentence_and_names_it(
    refused: Callable[..., str], name: str, value: str
) -> None:
    assert name in refused(**{name: value})


def _service(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=os.environ | {"BRIDGE_DATABASE_URL": ""} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_migrate_alone_makes_the_tables(tmp_path: Path) -> None:
    assert _service("migrate", BRIDGE_HOME=str(tmp_path)).returncode == 0
    Store(f"sqlite:///{tmp_path / 'bridge.db'}").ping()


def test_process_migrates_serves_and_leaves_on_sigterm_with_a_stream_open(tmp_path: Path) -> None:
    port = free_port()
    env = os.environ | {"BRIDGE_HOME": str(tmp_path), "BRIDGE_PORT": str(port)}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env=env | {"BRIDGE_DATABASE_URL": "", "BRIDGE_LEASE_SECOND": "3"},
            stderr=file,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            deadline = time.monotonic() + 120  # on a busy machine
            while True:
                try:
                    assert http.get("/readyz").status_code == 200
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            job = http.post("/jobs", json=BRIDGE).json()["id"]
            with http.stream("GET", f"/jobs/{job}/events") as response:
                lines = response.iter_lines()
                next(lines)
                process.terminate()
                list(lines)  # ends instead of hanging
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    timed = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?:INFO|WARNING) \S+: (.*)")
    told = [line[1] for line in map(timed.fullmatch, log.read_text().splitlines()) if line]
    assert len(told) == len(log.read_text().splitlines())
    assert "BRIDGE_LEASE_SECOND is not a setting" in told[0]
    events = [line for line in told if f"/jobs/{job}/events" in line]
    assert len(events) == 1
    assert re.fullmatch(r"req_\w+ GET \S+ 200 \S+ ms", events[0])


def test_settings_folder_is_where_the_catalog_looks(client: TestClient, settings: Settings) -> None:
    assert os.environ["BRIDGE_UPLOADS_DIR"] == str(settings.datasets_dir)
