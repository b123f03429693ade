"""Our gateway in front of a vLLM server, that server asked directly, and the local backend, in one
run.

    python -m benchmarks.gateway --vllm .venv-vllm/bin/python --model bridge-tiny

Each is asked over HTTP by so many clients at once for `--tokens` tokens at temperature 1, of the
base model and of one adapter; every server computes on one thread. The ways take turns within a
round, so that other work on the machine hits them alike, and draw the same tokens. Figures are
medians over rounds: generated tokens a second, and the median time to a whole answer. What the
gateway costs is the median of what it cost in each round: of throughput; by how much the same
request took longer (the median over requests); and how much later the median answer came, which
says little where answers are either short or long and the median may be either. Where the machine
is busy, waiting for a core is most of that; CPU time depends on it less: what the gateway uses for
a request, and its share of all that it and vLLM use; and what the client uses, which asks vLLM
directly by the same code.

So many clients ask in step: where answers end together, so do the next questions begin, and what
stands in between has to take them all at once. `--rates` asks so many times a second instead, at
random moments that are the same for every way (a Poisson process), whatever becomes of the answers;
times count from the moment that a request was due.

`--apart` gives vLLM with all its processes one core, and the gateway and this process, which is the
client, the others, for every way alike: so it is where the model does not compute on the gateway's
cores, as on a GPU. What the gateway then costs is what it costs, not what it takes from the model.
`--relay` asks through `benchmarks.relay` too, which hands on bytes and does nothing else: no
gateway costs less than that.

What a change to the gateway is worth shows `--beside`, another checkout, whose gateway is asked in
the same rounds. Of a model with more than a few million parameters, `--no-local` and a few requests
are enough for a while:

    python -m benchmarks.gateway --vllm … --model smollm2-135m-instruct --no-local \\
        --concurrency 1 8 --rounds 2 --requests 16 --tokens 24
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import httpx
import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks import servers
from benchmarks.serving import PROMPTS, random_adapters
from bridge_engine.models.folders import materialize_model
from service.generate.backend import loaded_name
from service.settings import Settings
from service.store import Store


@dataclass(frozen=True)
class Figures:
    """What one round found of one way."""

    rate: float
    """Tokens a second."""
    times: list[float]
    """Seconds of each request's answer, in the order of the requests."""
    used: float
    """CPU seconds of the server for a request."""
    own: float
    """CPU seconds of the client for a request."""

    @property
    def middle(self) -> float:
        """The median time."""
        return statistics.median(self.times)

    def added_to(self, other: Figures) -> float:
        """By how much the same request took longer: the median."""
        pairs = zip(self.times, other.times, strict=True)
        return statistics.median(mine - theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Load:
    """How requests come: from clients who ask again once answered, or so many a second."""

    clients: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.rate else f"{self.clients}"

    def starts(self, requests: int, seed: int) -> list[float]:
        """When each request is due, in seconds; with clients at once."""
        random = Random(seed)
        gaps = (random.expovariate(self.rate) if self.rate else 0.0 for _ in range(requests))
        return list(accumulate(gaps))


Found = dict[tuple[str, str, Load], list[Figures]]


@dataclass(frozen=True)
class Way:
    """One way to ask."""

    url: servers.Address
    models: dict[str, str]
    """What `base` and `adapter` are called there."""
    key: str = "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="python of vLLM's environment")
    parser.add_argument("--model", default="bridge-tiny")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="requests a second")
    parser.add_argument("--requests", type=int, default=64, help="a round")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--beside", type=Path, help="a checkout, migrated as far as this one")
    parser.add_argument("--no-local", action="store_true", help="leave out the local backend")
    parser.add_argument("--apart", action="store_true", help="vLLM on a core of its own")
    parser.add_argument("--relay", action="store_true", help="beside a relay of bytes")
    options = parser.parse_args()
    theirs_alone = _apart() if options.apart else None
    torch.set_num_threads(1)
    path = materialize_model(options.model)
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    busy: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        home = Path(scratch) / "home"
        folders = random_adapters(base, Path(scratch), options.rank)[:1]
        [name] = servers.register(home, options.model, options.rank, folders)
        store = Store.from_settings(Settings(home=home, database_url=""))
        there = loaded_name(store.adapter(name))
        store.close()
        server = stack.enter_context(
            servers.vllm(options.vllm, path, options.model, options.context, 16, theirs_alone)
        )
        ours = {"base": options.model, "adapter": name}
        theirs = {"base": options.model, "adapter": there}
        front = stack.enter_context(servers.gateway(home, "vllm", server))
        ways = {
            "vLLM": Way(server, theirs, servers.KEY),
            "gateway": Way(front, ours),
        }
        if options.beside is not None:
            other = servers.gateway(home, "vllm", server, options.beside.resolve())
            ways["beside"] = Way(stack.enter_context(other), ours)
        if options.relay:
            ways["relay"] = Way(stack.enter_context(servers.relay(server)), theirs, servers.KEY)
        if not options.no_local:
            ways["local"] = Way(stack.enter_context(servers.inference()), theirs)
            _load(ways["local"], there, folders[0], options.model)
        found = asyncio.run(_measure(ways, options, busy))
        if theirs_alone and (loose := servers.strays(server, theirs_alone)):
            raise SystemExit(f"vLLM did not keep to its core: {', '.join(loose)}")
    _print(options, found, statistics.mean(busy))


def _apart() -> set[int]:
    """Leaves one core to others, from now on and with all that is started here; which one."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        raise SystemExit("--apart needs two cores")
    last = {max(mine)}
    os.sched_setaffinity(0, mine - last)
    return last


async def _measure(ways: dict[str, Way], options: Any, busy: list[float]) -> Found:
    """Figures of each round, by way, model and number of clients."""
    found: Found = defaultdict(list)
    for round_number in range(options.rounds + 1):
        for kind in ("base", "adapter"):
            for load in _loads(options):
                order = list(ways) if round_number % 2 else list(reversed(ways))
                if not round_number:
                    order.sort(key=lambda way: way != "gateway")  # it loads the adapter
                for way in order:
                    figures = await _ask(ways[way], kind, load, options, round_number)
                    if round_number:  # the first round warms up, and loads what must be loaded
                        found[way, kind, load].append(figures)
        busy.append(psutil.getloadavg()[0])
    return found


def _loads(options: Any) -> list[Load]:
    return [Load(clients=n) for n in options.concurrency] + [Load(rate=r) for r in options.rates]


async def _ask(way: Way, kind: str, load: Load, options: Any, seed: int) -> Figures:
    requests = max(options.requests, 2 * load.clients)
    if load.clients == 1:
        requests = options.requests // 2
    turns = asyncio.Semaphore(load.clients or requests)
    times = [0.0] * requests
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {way.key}"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(600),
    ) as http:

        async def one(number: int, due: float) -> int:
            body = {
                "model": way.models[kind],
                "prompt": PROMPTS[number % len(PROMPTS)],
                "max_tokens": options.tokens,
                "temperature": 1.0,
                "seed": 1000 * seed + number,
            }
            async with turns:
                asked = time.perf_counter()
                if load.rate:
                    await asyncio.sleep(began + due - asked)
                    asked = began + due
                async with http.post(f"{way.url}/v1/completions", json=body) as answer:
                    content = await answer.json()
                times[number] = time.perf_counter() - asked
            answer.raise_for_status()
            return int(content["usage"]["completion_tokens"])

        used, own = servers.cpu_seconds(way.url), time.process_time()
        began = time.perf_counter()
        starts = load.starts(requests, seed)
        tokens = sum(await asyncio.gather(*map(one, range(requests), starts)))
        rate = tokens / (time.perf_counter() - began)
        used, own = servers.cpu_seconds(way.url) - used, time.process_time() - own
        return Figures(rate, times, used / requests, own / requests)


def _load(way: Way, name: str, folder: Path, base: str) -> None:
    body = {"lora_name": name, "lora_path": str(folder), "base_model": base}
    while httpx.post(f"{way.url}/v1/load_lora_adapter", json=body, timeout=600).status_code == 503:
        pass  # the base is being loaded


def _print(options: Any, found: Found, busy: float) -> None:
    apart = "vLLM on a core of its own, " if options.apart else ""
    print(
        f"{options.model}, float32, one thread a server, {apart}at most {options.tokens} tokens an "
        f"answer, {options.rounds} rounds of {options.requests} requests; mean load {busy:.1f} on "
        f"{psutil.cpu_count()} cores\n"
    )
    ways = dict.fromkeys(way for way, _, _ in found)
    for front in [way for way in ("gateway", "beside", "relay") if way in ways]:
        print(
            f"| model | clients or rate | vLLM (tokens/s, p50 ms) | {front} | throughput kept | "
            "added (ms): of a request, to p50 | its CPU (ms a request) | the client's: direct, "
            "through it | local | local / vLLM |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for kind in ("base", "adapter"):
            for load in _loads(options):
                rows = {way: found[way, kind, load] for way in ways}
                print(f"| {kind} | {load} | {' | '.join(_cells(rows, front))} |")
        print()


def _cells(rows: dict[str, list[Figures]], front: str) -> list[str]:
    """A line of the table for one gateway, behind the model and the number of clients."""

    def middle(way: str, figure: str) -> float:
        return statistics.median(getattr(row, figure) for row in rows[way])

    def both(way: str) -> str:
        return f"{middle(way, 'rate'):.0f}, {middle(way, 'middle') * 1e3:.0f}"

    pairs = list(zip(rows[front], rows["vLLM"], strict=True))
    kept = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
    added = statistics.median(ours.added_to(theirs) * 1e3 for ours, theirs in pairs)
    apart = statistics.median((ours.middle - theirs.middle) * 1e3 for ours, theirs in pairs)
    share = middle(front, "used") / (middle(front, "used") + middle("vLLM", "used"))
    local = ["", ""]
    if "local" in rows:
        local = [both("local"), f"{middle('local', 'rate') / middle('vLLM', 'rate'):.1f}×"]
    cpu = f"{middle(front, 'used') * 1e3:.1f} ({share:.0%})"
    client = f"{middle('vLLM', 'own') * 1e3:.1f}, {middle(front, 'own') * 1e3:.1f}"
    longer = f"{added:+.1f}, {apart:+.1f}"
    return [both("vLLM"), both(front), f"{kept:.0%}", longer, cpu, client, *local]


if __name__ == "__main__":
    main()
