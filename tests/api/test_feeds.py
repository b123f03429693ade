"""Many who follow one job: one look at the database for them all, and for each every event once."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from httpx_sse import EventSource

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from service.app import create_app
from service.jobs import events, feed
from service.jobs.feed import Feeds
from service.settings import Settings
from service.store import Store, breakdown
from tests.api.conftest import BRIDGE, Worker
from tests.support.ports import free_port
from tests.support.served import KEEPING
from tests.support.waiting import until


def metric(step: int) -> ev.Metric:
    return ev.Metric(step=step, metrics={"reward": step / 100})


@contextmanager
def serving(settings: Settings, port: int) -> Iterator[int]:
    """An API process's worth of service on a port; stops as one that is told to."""
    app = create_app(settings)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **KEEPING))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            app.state.stopping.set()
            server.should_exit = True
            thread.join(120)


async def listen(url: str, seed: int) -> list[tuple[int, str]]:
    """What one listener sees who hangs up every few events and always comes back."""
    dice, seen = random.Random(seed), []
    async with httpx.AsyncClient(timeout=120) as http:
        while True:
            headers = {"Last-Event-ID": str(seen[-1][0])} if seen else {}
            patience = dice.choice([1, 5, 40, 10_000])
            try:
                async with http.stream("GET", url, headers=headers) as response:
                    assert response.status_code == 200
                    async for message in EventSource(response).aiter_sse():
                        if message.event == "end":
                            return seen
                        seen.append((int(message.id), message.event))
                        patience -= 1
                        if patience == 0:
                            break
            except httpx.HTTPError:
                await asyncio.sleep(0.1)  # the service is down for a moment


def test_each_of_fifty_sees_every_event_once_over_a_lost_attempt_and_a_restart(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP_BYTES", 3000)  # a dozen events or two: many fall behind
    store = Store.from_settings(settings)
    store.retry_seconds = 0
    worker = Worker(store)
    job = store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=60)[0].id
    restarted = threading.Event()

    def train(steps: range, attempt: int) -> None:
        for step in steps:
            worker.emit(job, attempt, metric(step), ev.Log(message=f"step {step}"))
            time.sleep(0.005)

    def run() -> None:
        attempt = worker.claim(job)
        train(range(1, 31), attempt)
        store.release(job, attempt, breakdown("infra", "worker_lost", "gone"))
        attempt = worker.claim(job)
        worker.emit(job, attempt, ev.Resume(step=20))
        train(range(21, 40), attempt)
        restarted.wait(120)
        train(range(40, 61), attempt)
        worker.emit(job, attempt, ev.Done(step=60, result={}))
        store.finish(job, attempt, "succeeded", result={})

    async def everybody(port: int) -> list[list[tuple[int, str]]]:
        url = f"http://127.0.0.1:{port}/jobs/{job}/events"
        return await asyncio.gather(*(listen(url, seed) for seed in range(50)))

    seen: list[list[tuple[int, str]]] = []
    with serving(settings, free_port()) as port:
        listeners = threading.Thread(target=lambda: seen.extend(asyncio.run(everybody(port))))
        writer = threading.Thread(target=run)
        listeners.start()
        writer.start()
        time.sleep(1.0)
    with serving(settings, port):
        restarted.set()
        writer.join(120)
        listeners.join(120)
    written = [(row.seq, row.type) for row in store.events_after(job, limit=1000)]
    store.close()
    assert [seq for seq, _ in written] == list(range(1, len(written) + 1))
    assert Counter(kind for _, kind in written)["resume"] == 1
    assert len(seen) == 50
    assert all(one == written for one in seen)


def test_any_number_of_listeners_costs_one_look_at_the_database(
    http: httpx.Client, client: TestClient, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.05)
    looks: Counter[str] = Counter()
    for name in ("events_after", "ended_as", "get_job"):
        method = getattr(Store, name)

        def counted(*arguments: Any, name: str = name, method: Any = method) -> Any:
            looks[name] += 1
            return method(*arguments)

        monkeypatch.setattr(Store, name, counted)
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=http.base_url, timeout=120, limits=limits) as many:
        opened = [many.stream("GET", f"/jobs/{job}/events") for _ in range(40)]
        streams = [context.__enter__().iter_lines() for context in opened]
        assert [next(lines) for lines in streams] == [": connected"] * 40
        time.sleep(0.5)
        looks.clear()
        until(lambda: looks["ended_as"] >= 10)
        assert looks["events_after"] <= looks["ended_as"] + 1
        assert looks["get_job"] == 0
        feeds: Feeds = client.app.state.feeds  # type: ignore[attr-defined]
        assert len(feeds) == 1
        for context in opened:
            context.__exit__(None, None, None)
    until(lambda: len(feeds) == 0, otherwise="it ends with its last listener")


def test_a_slow_reader_loses_nothing_and_keeps_nobody_waiting(
    store: Store, worker: Worker, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP_BYTES", 1000)
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(events, "CHUNK_BYTES", 100)
    stopping = threading.Event()
    attempt = worker.claim(job)

    async def run() -> tuple[bytes, bytes]:
        everyone = Feeds(store, stopping)
        slow = events.follow(everyone, store, job, 0, stopping)
        fast = events.follow(everyone, store, job, 0, stopping)
        worker.emit(job, attempt, metric(0))
        held = b"".join([await anext(slow), await anext(slow)])
        whole = b"".join([await anext(fast), await anext(fast)])
        for step in range(1, 60):
            worker.emit(job, attempt, metric(step))
            whole += await asyncio.wait_for(anext(fast), 120)
        store.finish(job, attempt, "succeeded", result={})
        for stream in (fast, slow):
            rest = b"".join([chunk async for chunk in stream])
            whole, held = (whole + rest, held) if stream is fast else (whole, held + rest)
        assert len(everyone) == 0
        return whole, held

    for text in asyncio.run(run()):
        seen = [line for line in text.decode().splitlines() if line.startswith("id: ")]
        assert seen == [f"id: {seq}" for seq in range(1, 61)]
        assert text.endswith(
            b'event: end\ndata: {"job_id": "%s", "status": "succeeded"}\n\n' % job.encode()
        )
