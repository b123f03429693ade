"""No web page that is open in this machine's browser uses the service, and every program does."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.origin import _address
from service.settings import Settings
from service.store import Store
from tests.api.conftest import BRIDGE, connect, problem

EVIL = "https://evil.example"


def served(settings: Settings, **change: object) -> TestClient:
    return connect(settings.model_copy(update=change))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "[::1]:8000"])
def test_every_name_of_loopback_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example"),
        *("api", "192.0.2.7", "", "localhost@evil.example", "a b", "[::1", "localhost:x"),
    ],
)
def test_name_that_is_not_the_services_is_403_everywhere(client: TestClient, host: str) -> None:
    """DNS rebinding: the page's own name has come to mean 127.0.0.1."""
    for path in ("/jobs", "/jobs/x/events", "/docs", "/openapi.json", "/metrics", "/healthz", "/x"):
        body = problem(client.get(path, headers={"Host": host}), 403, "foreign_host")
        assert "BRIDGE_ALLOWED_HOSTS" in body["detail"]
        assert body["given"] == host


@pytest.mark.parametrize("name", ["a" * 254, "[" + "1" * 254 + "]", "a." * 30_000])
def test_name_longer_than_any_is_refused_and_not_kept(client: TestClient, name: str) -> None:
    _address.cache_clear()
    problem(client.get("/jobs", headers={"Host": name}), 403, "foreign_host")
    origin = client.get("/jobs", headers={"Origin": f"http://{name}"})
    problem(origin, 403, "foreign_origin")
    assert _address.cache_info().currsize == 1  # the client's own address


def test_longest_name_is_still_one(settings: Settings) -> None:
    name = ".".join(["a" * 61] * 4) + ".arpa"
    assert len(name) == 252
    with served(settings, allowed_hosts=[name]) as client:
        assert client.get("/jobs", headers={"Host": f"{name}:8000"}).status_code == 200


@pytest.mark.parametrize("others", [["127.0.0.1"], ["evil.example"], ["", ""]])
def test_several_hosts_are_400(client: TestClient, others: list[str]) -> None:
    """One reader would go by the first, another by the last."""
    headers = [("Host", host) for host in ("127.0.0.1", *others)]
    body = problem(client.get("/jobs", headers=headers), 400, "broken_host")
    assert f"{1 + len(others)} Host headers" in body["detail"]


@pytest.mark.parametrize(("version", "status"), [("1.1", 400), ("1.0", 403)])
def test_request_without_a_host_is_refused(http: httpx.Client, version: str, status: int) -> None:
    """HTTP/1.0 knows no Host, and needs none; but then it says no name of the service's either."""
    at = (http.base_url.host, http.base_url.port)
    with socket.create_connection(at, timeout=120) as connection:
        connection.sendall(f"GET /healthz HTTP/{version}\r\n\r\n".encode())
        assert connection.recv(12).endswith(f" {status}".encode())


ATTACKS: dict[str, Callable[[TestClient, str, dict[str, str]], Any]] = {
    "job without a type": lambda c, _, h: c.post("/jobs", content=b"{}", headers=h),
    "job": lambda c, _, h: c.post("/jobs", json=BRIDGE, headers=h),
    "form": lambda c, _, h: c.post("/datasets", files={"file": ("a", b"{}")}, headers=h),
    "cancellation": lambda c, job, h: c.post(f"/jobs/{job}/cancel", headers=h),
    "generation": lambda c, _, h: c.post("/generate", json={}, headers=h),
    "reading": lambda c, _, h: c.get("/jobs", headers=h),
}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Origin": "chrome-extension://localhost"},
        {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
    ids=lambda headers: ",".join(headers.values()),
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_page_elsewhere_does_nothing(
    client: TestClient, store: Store, job: str, attack: str, headers: dict[str, str]
) -> None:
    problem(ATTACKS[attack](client, job, headers), 403, "foreign_origin")
    assert store.get_job(job).status == "queued"
    assert len(store.list_jobs()[0]) == 1
    assert store.list_datasets()[0] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"},  # a page of one's own
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
    ids=lambda headers: ",".join(headers.values()) or "a program",
)
def test_programs_and_pages_of_this_machine_do_everything(
    client: TestClient, job: str, headers: dict[str, str]
) -> None:
    assert client.get("/jobs", headers=headers).status_code == 200
    assert client.post("/jobs", json=BRIDGE, headers=headers).status_code == 201
    assert client.post(f"/jobs/{job}/cancel", headers=headers).json()["status"] == "cancelled"


def test_link_elsewhere_may_be_followed_and_a_form_may_not(client: TestClient, job: str) -> None:
    clicked = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert client.get("/docs", headers=clicked).status_code == 200
    problem(client.post(f"/jobs/{job}/cancel", headers=clicked), 403, "foreign_origin")


def test_names_that_were_set_are_answered_and_their_pages_may_ask(settings: Settings) -> None:
    with served(settings, host="192.0.2.7", allowed_hosts=["bridge.example.org"]) as client:
        for host in ("bridge.example.org", "Bridge.Example.org:443", "192.0.2.7:8000", "localhost"):
            headers = {"Host": host, "Origin": "https://bridge.example.org"}
            assert client.get("/jobs", headers=headers).status_code == 200
        problem(client.get("/jobs", headers={"Host": "example.org"}), 403, "foreign_host")
        problem(client.get("/jobs", headers={"Host": "api"}), 403, "foreign_host")
        problem(client.get("/jobs", headers={"Origin": EVIL}), 403, "foreign_origin")


def test_service_in_a_compose_network_is_reached_by_its_names_there(settings: Settings) -> None:
    """Published as 127.0.0.1, called `api` within, probed by address; and no page gets in."""
    with served(settings, host="0.0.0.0", allow_unauthenticated=True) as client:
        for host in ("127.0.0.1:8000", "localhost:8000", "api:8000", "172.18.0.5:8000"):
            assert client.get("/jobs", headers={"Host": host}).status_code == 200
        problem(client.get("/jobs", headers={"Host": "evil.example"}), 403, "foreign_host")
        for page in (EVIL, "http://intranet", "http://172.18.0.9"):
            headers = {"Host": "api:8000", "Origin": page}
            problem(client.get("/jobs", headers=headers), 403, "foreign_origin")


def test_refusals_are_counted(client: TestClient) -> None:
    client.get("/jobs", headers={"Host": "evil.example"})
    counted = 'bridge_http_requests_total{method="GET",route="none",status="403"} 1.0'
    assert counted in client.get("/metrics").text
