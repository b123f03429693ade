"""What every path of the API takes: HEAD wherever GET, and a refusal that names all it takes."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from bridge_http.bodiless import HeadAsGet
from tests.api.conftest import problem


def test_head_is_answered_as_get_without_a_body_by_every_route(
    client: TestClient, job: str, http: httpx.Client
) -> None:
    described = client.get("/openapi.json").json()["paths"]
    paths = ["/", "/docs", "/openapi.json", *(p for p in described if "get" in described[p])]
    assert {"/jobs/{job_id}/events", "/jobs/{job_id}/metrics", "/v1/models"} <= set(paths)
    for path in paths:
        path = path.replace("{job_id}", job).replace("{model:path}", "bridge-tiny")
        head = http.head(path, timeout=20)
        with http.stream("GET", path) as get:  # one of them has no end
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert head.headers.get("content-type") == get.headers.get("content-type"), path
            # Its number may be another: /metrics counts these very requests.
            assert ("content-length" in head.headers) == ("content-length" in get.headers), path
        assert head.headers["x-request-id"]


def test_head_of_a_stream_leaves_the_connection_and_no_listener(
    client: TestClient, job: str, http: httpx.Client
) -> None:
    for _ in range(3):
        assert http.head(f"/jobs/{job}/events", timeout=20).status_code == 200
    assert http.get("/healthz").json() == {"status": "ok"}
    assert not len(client.app.state.feeds)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("DELETE", "/jobs", ["GET", "HEAD", "POST"]),
        ("PUT", "/jobs/abc", ["DELETE", "GET", "HEAD", "PATCH"]),
        ("DELETE", "/projects/default", ["GET", "HEAD", "PUT"]),
        ("HEAD", "/generate", ["POST"]),
        ("GET", "/v1/completions", ["POST"]),
    ],
)
def test_a_wrong_method_is_told_all_that_the_path_takes(
    client: TestClient, method: str, path: str, takes: list[str]
) -> None:
    response = client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == ", ".join(takes)
    if method != "HEAD" and not path.startswith("/v1"):
        body = problem(response, 405, "method_not_allowed")
        assert body["detail"].endswith(f"it takes {', '.join(takes)}")
        assert body["allowed"] == takes


def test_head_ends_a_stream_that_asks_nobody_whether_it_is_still_heard() -> None:
    sent: list[Message] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
            await asyncio.sleep(0)

    async def nothing() -> Message:
        raise AssertionError("nobody is asked")

    async def keep(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": "/"}
    asyncio.run(asyncio.wait_for(HeadAsGet(endless)(scope, nothing, keep), 60))
    assert [message.get("body") for message in sent] == [None, b""]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_with_a_slash_too_many_is_told_the_right_one(
    client: TestClient, method: str
) -> None:
    response = client.request(method, "/jobs/", follow_redirects=False)
    assert problem(response, 404, "unknown_path")["detail"].endswith("did you mean /jobs?")


def test_the_page_of_the_api_is_whole_without_the_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "'/openapi.json'" in page
    assert not re.search(r"https?://", page)
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(parts) == 3  # its script, its style, its icon
    for part in parts:
        answer = client.get(part)
        assert (answer.status_code, len(answer.content) > 1000) == (200, True), part
        assert not answer.headers["content-type"].startswith(("text/html", "application/json"))


def test_description_names_every_method_of_training(client: TestClient) -> None:
    from bridge_engine.methods import METHODS

    told = client.get("/openapi.json").json()["info"]["description"]
    assert all(f"`{name}`" in told for name in METHODS)
