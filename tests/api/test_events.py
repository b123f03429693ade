"""Following a job: every event exactly once, over any number of broken connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from httpx_sse import EventSource, ServerSentEvent

from bridge_engine import events as ev
from service.jobs import events as follow
from service.jobs import feed
from service.store import EventRow, Store
from tests.api.conftest import Worker, problem


def stream(
    http: httpx.Client, job: str, *, last: str | None = None, query: str = ""
) -> Iterator[ServerSentEvent]:
    headers = {"Last-Event-ID": last} if last is not None else {}
    with http.stream("GET", f"/jobs/{job}/events{query}", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield from EventSource(response).iter_sse()


def metric(step: int) -> ev.Metric:
    return ev.Metric(step=step, metrics={"reward": step / 100})


def test_finished_jobs_stream_is_its_events_in_order_and_an_end(
    http: httpx.Client, store: Store, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    worker.emit(job, attempt, ev.Phase(phase="loading"), metric(1), metric(2))
    worker.emit(job, attempt, ev.Done(step=2, result={"accuracy_after": 0.5}))
    store.finish(job, attempt, "succeeded", result={})
    messages = list(stream(http, job))
    assert [m.event for m in messages] == ["phase", "metric", "metric", "done", "end"]
    assert [m.id for m in messages[:-1]] == ["1", "2", "3", "4"]
    body = messages[1].json()
    assert (body["seq"], body["type"], body["metrics"]) == (2, "metric", {"reward": 0.01})
    assert messages[-1].json() == {"job_id": job, "status": "succeeded"}


def test_each_event_comes_exactly_once_over_broken_connections(
    http: httpx.Client, store: Store, worker: Worker, job: str
) -> None:
    """A reader that hangs up every few events while another thread appends."""
    total = 300
    attempt = worker.claim(job)

    def run() -> None:
        for step in range(1, total + 1, 5):
            worker.emit(job, attempt, *(metric(s) for s in range(step, step + 5)))
            time.sleep(0.02)
        store.finish(job, attempt, "succeeded", result={})

    writer = threading.Thread(target=run)
    writer.start()
    seen: list[int] = []
    connections, ended = 0, False
    while not ended:
        connections += 1
        for count, message in enumerate(stream(http, job, last=str(seen[-1]) if seen else None)):
            if message.event == "end":
                ended = True
                break
            seen.append(int(message.id))
            if count == 40:
                break  # hangs up in the middle
    writer.join()
    assert seen == list(range(1, total + 1))
    assert connections > 3


def test_last_event_id_goes_before_after(
    http: httpx.Client, store: Store, worker: Worker, job: str
) -> None:
    attempt = worker.claim(job)
    worker.emit(job, attempt, *(metric(step) for step in range(1, 7)))
    store.finish(job, attempt, "failed", error=None)
    assert [m.id for m in stream(http, job, query="?after=4")][:-1] == ["5", "6"]
    assert [m.id for m in stream(http, job, last="5", query="?after=1")][:-1] == ["6"]
    assert [m.event for m in stream(http, job, last="6")] == ["end"]


def test_more_events_than_a_batch_come_whole(
    http: httpx.Client, store: Store, worker: Worker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BATCH", 7)
    attempt = worker.claim(job)
    worker.emit(job, attempt, *(metric(step) for step in range(1, 51)))
    store.finish(job, attempt, "succeeded", result={})
    assert [m.id for m in stream(http, job)][:-1] == [str(n) for n in range(1, 51)]


def test_events_written_just_before_the_end_are_not_lost(
    http: httpx.Client,
    store: Store,
    worker: Worker,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends in the very moment after the stream has looked for events and found none."""
    attempt = worker.claim(job)
    look, once = Store.events_after, threading.Lock()

    def look_and_then_end(self: Store, *arguments: Any) -> list[EventRow]:
        rows = look(self, *arguments)
        if once.acquire(blocking=False):
            worker.emit(job, attempt, metric(1), ev.Done(step=1, result={}))
            store.finish(job, attempt, "succeeded", result={})
        return rows

    monkeypatch.setattr(Store, "events_after", look_and_then_end)
    assert [m.event for m in stream(http, job)] == ["metric", "done", "end"]


def test_cancelling_a_queued_job_ends_its_stream(http: httpx.Client, job: str) -> None:
    messages: list[ServerSentEvent] = []
    reader = threading.Thread(target=lambda: messages.extend(stream(http, job)))
    reader.start()
    time.sleep(0.5)
    http.post(f"/jobs/{job}/cancel")
    reader.join(120)
    assert [m.json()["status"] for m in messages] == ["cancelled"]


def test_silent_stream_says_it_is_alive(
    http: httpx.Client, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "KEEPALIVE_SECONDS", 0.3)
    with http.stream("GET", f"/jobs/{job}/events") as response:
        lines = response.iter_lines()
        alive = [line for line in (next(lines) for _ in range(8)) if "keep-alive" in line]
    assert alive
    assert all(line.startswith(":") for line in alive)


def test_stream_ends_when_the_service_stops(
    http: httpx.Client, client: TestClient, job: str
) -> None:
    messages = stream(http, job)
    threading.Timer(0.5, client.app.state.stopping.set).start()  # type: ignore[attr-defined]
    began = time.monotonic()
    assert list(messages) == []  # no `end`: the job goes on, and the client comes back
    assert time.monotonic() - began < 120


def test_open_streams_do_not_keep_other_requests_waiting(http: httpx.Client, job: str) -> None:
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=http.base_url, timeout=120, limits=limits) as many:
        opened = [many.stream("GET", f"/jobs/{job}/events") for _ in range(60)]
        for context in opened:
            context.__enter__()
        began = time.monotonic()
        assert http.get(f"/jobs/{job}").status_code == 200
        assert time.monotonic() - began < 120
        for context in opened:
            context.__exit__(None, None, None)


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_foreign_last_event_id_is_422(client: TestClient, job: str, last: str) -> None:
    response = client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": last})
    assert problem(response, 422)["param"] == "Last-Event-ID"
