"""Following a job: nothing is skipped and nothing comes twice, whatever the connection does."""

from __future__ import annotations

import asyncio
import json

import pytest

from bridge_client import APIStatusError, AsyncClient, Client, ConnectionError, Event, _stream
from tests.client.flaky import flaky, hang_up, say, stream

END = 'event: end\ndata: {"job_id": "job_1", "status": "succeeded"}\n\n'
DONE = say(200, json.dumps({"id": "job_1", "status": "succeeded"}))


def event(seq: int, kind: str = "metric", **fields: object) -> str:
    body = {"seq": seq, "type": kind, "time": 1.0, "step": seq, **fields}
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream, "jittered", lambda delay: 0.01)


def sync_events(url: str) -> list[Event]:
    with Client(url) as client:
        return list(client.events("job_1"))


def async_events(url: str) -> list[Event]:
    async def collect() -> list[Event]:
        async with AsyncClient(url) as client:
            return [event async for event in client.events("job_1")]

    return asyncio.run(collect())


BOTH = pytest.mark.parametrize("collect", [sync_events, async_events])


@BOTH
def test_a_broken_stream_goes_on_after_the_last_event_seen(collect) -> None:
    answers = (
        stream(event(1) + event(2) + 'id: 3\nevent: metric\ndata: {"seq": 3', torn=True),
        hang_up,
        stream(event(3)),  # closed in order, as by a service that restarts
        say(503, "{}"),
        stream(event(4, "done", result={}) + END),
    )
    with flaky(*answers) as server:
        events = collect(server.url)
    assert [e.seq for e in events] == [1, 2, 3, 4]
    asked = [headers.get("last-event-id") for _, _, headers, _ in server.requests]
    assert asked == [None, "2", "2", "3", "3"]


@BOTH
def test_an_event_that_comes_again_is_seen_once(collect) -> None:
    with flaky(stream(event(1) + event(2), torn=True), stream(event(2) + event(3) + END)) as server:
        assert [e.seq for e in collect(server.url)] == [1, 2, 3]


@BOTH
def test_comments_keep_the_stream_alive_and_are_no_events(collect) -> None:
    text = "retry: 1000\n: connected\n\n" + event(1) + ": keep-alive\n\n" + END
    with flaky(stream(text)) as server:
        assert [e.type for e in collect(server.url)] == ["metric"]
    assert len(server.requests) == 1


def test_a_job_that_does_not_exist_is_an_error_at_once() -> None:
    with (
        flaky(say(404, '{"code": "job_not_found"}')) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError),
    ):
        list(client.events("job_1"))
    assert len(server.requests) == 1


def test_a_service_that_never_comes_back_ends_the_patience() -> None:
    with flaky(stream(event(1), torn=True), hang_up) as server, Client(server.url) as client:
        events = client.events("job_1", patience=0.2)
        assert next(events).seq == 1
        with pytest.raises(ConnectionError):
            next(events)


def test_patience_begins_anew_when_the_service_answers() -> None:
    breaks = [stream(": connected\n\n", torn=True) for _ in range(30)]
    with flaky(*breaks, stream(event(1) + END)) as server, Client(server.url) as client:
        assert [e.seq for e in client.events("job_1", patience=0.05)] == [1]


def test_wait_reports_every_event_and_returns_the_job_as_it_ended() -> None:
    running = say(200, json.dumps({"id": "job_1", "status": "running"}))
    seen: list[int] = []
    with (
        flaky(running, stream(event(1) + event(2) + END), running, DONE) as server,
        Client(server.url) as client,
    ):
        job = client.wait("job_1", progress=lambda event: seen.append(event.seq))
    assert seen == [1, 2]
    assert job.status == "succeeded"


def test_following_can_start_after_an_event() -> None:
    with flaky(stream(event(6) + END)) as server, Client(server.url) as client:
        assert [e.seq for e in client.events("job_1", after=5)] == [6]
    assert server.requests[0][2]["last-event-id"] == "5"


def test_an_event_keeps_the_fields_of_its_type() -> None:
    with flaky(stream(event(1, metrics={"reward": 0.5}) + END)) as server:
        (one,) = sync_events(server.url)
    assert one.get("metrics") == {"reward": 0.5}


def test_the_last_look_at_a_job_is_as_patient_as_the_stream() -> None:
    """The service restarts between the last event and the question how the job ended."""
    running = say(200, json.dumps({"id": "job_1", "status": "running"}))
    away = [hang_up] * 8 + [say(503, "{}")] * 4 + [say(500, "{}")] * 3

    async def wait(url: str) -> str:
        async with AsyncClient(url, retries=0) as client:
            return (await client.wait("job_1")).status

    answers = running, stream(event(1) + END), *away, running, DONE
    with flaky(*answers) as server, Client(server.url, retries=0) as client:
        assert client.wait("job_1").status == "succeeded"
    with flaky(*answers) as server:
        assert asyncio.run(wait(server.url)) == "succeeded"


def test_a_job_that_is_gone_at_the_last_look_is_told_at_once() -> None:
    running = say(200, json.dumps({"id": "job_1", "status": "running"}))
    with (
        flaky(running, stream(event(1) + END), say(404, "{}")) as server,
        Client(server.url) as client,
        pytest.raises(APIStatusError),
    ):
        client.wait("job_1")
    assert len(server.requests) == 3
