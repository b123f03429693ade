"""Each request is one line of the log, under the id that its answer carries."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_http import requests
from service.errors import ApiError
from service.generate.serving import Serving
from service.settings import Settings
from service.store import Store
from service.store.errors import StoreUnavailable
from tests.api.conftest import connect

ASK = {"model": "bridge-tiny", "prompt": "1", "stream": True}
CHAT = {"model": "bridge-tiny", "messages": [{"role": "user", "content": "1"}], "stream": True}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=requests.__name__)
    return caplog


def told(lines: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in lines.records if record.name == requests.__name__]


def test_each_request_is_one_line_with_id_method_path_status_and_time(
    client: TestClient, lines: pytest.LogCaptureFixture
) -> None:
    id = client.get("/jobs?limit=3").headers["x-request-id"]
    (line,) = told(lines)
    assert re.fullmatch(rf"{id} GET /jobs 200 \d+\.\d ms", line.message)
    assert line.levelno == logging.INFO


@pytest.mark.parametrize("path", ["/jobs/nope", "/v1/models/nope", "/nothing", "/jobs?limit=x"])
def test_a_refusal_is_one_line_at_info_with_its_code(
    client: TestClient, lines: pytest.LogCaptureFixture, path: str
) -> None:
    answer = client.get(path)
    (line,) = told(lines)
    code = answer.json().get("code") or answer.json()["error"]["code"]
    code = "unknown_model" if code == "model_not_found" else code
    found = re.fullmatch(r"(\S+) GET (\S+) (\d+) \S+ ms (\w+)", line.message)
    assert found
    assert found[1] == answer.headers["x-request-id"]
    assert found.group(2, 3, 4) == (path.partition("?")[0], str(answer.status_code), code)
    assert line.levelno == logging.INFO


def test_a_failure_is_one_line_above_info_with_the_reason(
    client: TestClient, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise StoreUnavailable("the disk is\nfull", reason="full")

    monkeypatch.setattr(Store, "get_job", broken)
    answer = client.get("/jobs/job_x")
    (line,) = told(lines)
    assert answer.status_code == 503
    assert answer.json()["request_id"] in line.message
    assert line.message.endswith("ms database_full: the disk is\\nfull")
    assert line.levelno == logging.WARNING


@pytest.mark.parametrize(
    ("path", "body"), [("/generate", ASK), ("/v1/completions", ASK), ("/v1/chat/completions", CHAT)]
)
def test_an_error_within_a_stream_is_a_line_with_the_id_that_the_stream_tells(
    client: TestClient,
    lines: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
) -> None:
    class Broken:
        async def chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
            yield [{"choices": [{"index": 0, "text": "a"}]}]
            raise ApiError(502, "inference_interrupted", "it broke off")

        async def aclose(self) -> None: ...

    async def stream(*_: Any) -> Broken:
        return Broken()

    monkeypatch.setattr(Serving, "stream", stream)
    answer = client.post(path, json=body)
    id = answer.headers["x-request-id"]
    assert id in answer.text
    error, end = told(lines)
    wanted = f"{id} POST {path} 502 inference_interrupted within the answer: it broke off"
    assert error.message == wanted
    assert error.levelno == logging.WARNING
    assert end.message.startswith(f"{id} POST {path} 200 ")


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_an_error_within_a_stream_names_no_places_to_others(
    settings: Settings,
    lines: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    told: bool,
) -> None:
    class Broken:
        async def chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
            raise ApiError(502, "inference_interrupted", "10.0.0.7 is away", outside="it is away")
            yield []

        async def aclose(self) -> None: ...

    async def stream(*_: Any) -> Broken:
        return Broken()

    monkeypatch.setattr(Serving, "stream", stream)
    with connect(settings.model_copy(update={"host": host})) as client:
        for path in ("/generate", "/v1/completions"):
            answer = client.post(path, json=ASK).text
            assert ("10.0.0.7" in answer) is told
            assert "is away" in answer
    assert sum("10.0.0.7 is away" in line for line in lines.messages) == 2


def test_an_answer_that_breaks_off_unforeseen_is_told_by_its_id(
    client: TestClient, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        async def chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
            yield [{"choices": [{"index": 0, "text": "a"}]}]
            raise RuntimeError("a mistake")

        async def aclose(self) -> None: ...

    async def stream(*_: Any) -> Broken:
        return Broken()

    monkeypatch.setattr(Serving, "stream", stream)
    with pytest.raises(RuntimeError):
        client.post("/generate", json=ASK, headers={"X-Request-Id": "trace-7"})
    assert "trace-7 POST /generate 500 internal" in told(lines)[0].message


def test_no_path_forges_a_line_of_the_log(
    client: TestClient, lines: pytest.LogCaptureFixture
) -> None:
    client.get("/jobs/a%0Areq_1%20GET%20/%20200%1B[31m" + "x" * 5000)
    (line,) = told(lines)
    assert line.message.isprintable()
    assert len(line.message) < 1000
