"""`bridge up`: starts the API, the worker and inference as child processes and keeps them running.

None of them is imported here: each is `python -m …` in a process group of its own, with its log in
HOME/logs. A child that dies is started again after a pause that doubles. A child that dies again
and again before the service was ever ready ends everything, with the end of its log: then
something is wrong that waiting does not mend. So does, at once, one that says why it cannot start
(status 2).

`python -m bridge_client.supervisor` is what `bridge up --detach` leaves behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bridge_client import hints, ports
from bridge_client.child import Child
from bridge_client.errors import CannotStartError
from bridge_client.home import Home, Process, State

GIVE_UP_AFTER = 4
"""Deaths of one child before the service was ever ready."""
CANNOT_START = 2
"""The exit status of a child that has told in its log, in a sentence, why it cannot start."""
READY_WITHIN = 180.0
"""Seconds; the first start on a slow disk reads a gigabyte of libraries."""
POLITE = {"service": 15.0, "inference": 15.0}
"""Seconds between SIGTERM and SIGKILL. A worker gets BRIDGE_GRACE_SECONDS and some more, for its
engine has a step to finish and a state to save."""


@dataclass
class Supervisor:
    """The three processes of an embedded service in one home, on one port."""

    home: Home
    port: int
    host: str = ports.LOOPBACK
    say: Callable[[str], Any] = print
    children: dict[str, Child] = field(default_factory=dict)
    ready: bool = False
    stopping: bool = False

    def __post_init__(self) -> None:
        self.inference_port = ports.free_port(self.port + 1, but=frozenset({self.port}))
        self.url = f"http://{ports.reachable(self.host)}:{self.port}"
        # A vLLM server is somebody else's to start: it takes its own environment, and a GPU.
        elsewhere = os.environ.get("BRIDGE_INFERENCE_BACKEND") == "vllm"
        self.inference_url = (
            os.environ.get("BRIDGE_INFERENCE_URL", "")
            if elsewhere
            else f"http://{ports.LOOPBACK}:{self.inference_port}"
        )
        environment = os.environ | {
            "BRIDGE_HOME": str(self.home.path),
            "BRIDGE_HOST": self.host,
            "BRIDGE_PORT": str(self.port),
            "BRIDGE_DISPATCH": "local",
            "BRIDGE_INFERENCE_PORT": str(self.inference_port),
            "BRIDGE_INFERENCE_URL": self.inference_url,
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("BRIDGE_UPLOADS_DIR", str(self.home.path / "datasets"))
        self.children = {
            name: Child(name, [sys.executable, "-m", name], environment, self.home.log(name))
            for name in ("service", "worker", *(() if elsewhere else ("inference",)))
        }

    def run(self) -> int:
        """Until SIGTERM or SIGINT; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop_asked)
        try:
            self._start(["service"])
            self._until_well(f"{self.url}/healthz")  # it migrates the database for the others
            self._start([name for name in self.children if name != "service"])
            self._until_well(f"{self.url}/readyz")
            if "inference" in self.children:
                self._until_well(f"{self.inference_url}/health")
            worker = self.children["worker"]
            self._until("the worker", lambda: None if worker.is_up() else "it has not said so")
            if not self.stopping:
                self.ready = True
                self._write()
                for line in (
                    f"Bridge is ready at {self.url}",
                    *hints.elsewhere(self.home, self.url),
                ):
                    self.say(line)
            while not self.stopping:
                self._tend()
                time.sleep(0.2)
            return 0
        finally:
            self._stop_all()
            self.home.forget()

    def _stop_asked(self, *_: Any) -> None:
        self.stopping = True

    def _start(self, names: Sequence[str]) -> None:
        if self.stopping:
            return
        for name in names:
            self.children[name].start()
        self._write()

    def _until_well(self, url: str) -> None:
        """Tends the children until `url` answers 200."""

        def trouble() -> object:
            try:
                answer = httpx.get(url, timeout=5, trust_env=False)  # ours: no proxy knows it
            except httpx.TransportError as error:
                return error
            return None if answer.is_success else f"HTTP {answer.status_code} {answer.text[:300]}"

        self._until(url, trouble)

    def _until(self, what: str, trouble: Callable[[], object]) -> None:
        """Tends the children until there is no `trouble`."""
        deadline = time.monotonic() + READY_WITHIN
        while not self.stopping:
            self._tend()
            last = trouble()
            if last is None:
                return
            if time.monotonic() > deadline:
                raise CannotStartError(
                    f"{what} did not get ready within {READY_WITHIN:g} s ({last}); "
                    f"the logs are in {self.home.logs}"
                )
            time.sleep(0.2)

    def _tend(self) -> None:
        """Notices deaths, and starts again what has been dead for long enough."""
        for child in self.children.values():
            status = child.died()
            if status is not None and not self.stopping:
                self._mourn(child, status)
            due = child.popen is None and child.deaths and time.monotonic() >= child.start_at
            if due and not self.stopping:
                child.start()
                self._write()

    def _mourn(self, child: Child, status: int) -> None:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        if not self.ready and status == CANNOT_START:
            raise CannotStartError(child.said() or f"{child.name} cannot start", CANNOT_START)
        if not self.ready and child.deaths >= GIVE_UP_AFTER:
            raise CannotStartError(
                f"{child.name} ended {child.deaths} times (last: {how}) before the service was "
                f"ready. The end of {child.log}:\n{self.home.tail(child.name)}"
            )
        pause = child.start_at - time.monotonic()
        self.say(f"{child.name} ended with {how}; starting it again in {pause:.1f} s ({child.log})")

    def _write(self) -> None:
        alive = {c.name: c.process for c in self.children.values() if c.process}
        me = Process.of(os.getpid())
        self.home.write(State(self.url, self.inference_url, me, alive, self.ready))

    def _stop_all(self) -> None:
        """SIGTERM to each child, SIGKILL to the groups of those that do not listen."""
        running = {name: child.popen for name, child in self.children.items() if child.popen}
        for popen in running.values():
            popen.terminate()
        begun = time.monotonic()
        for name, popen in running.items():
            patience = POLITE.get(name, grace_seconds() + 10.0)
            try:
                popen.wait(max(0.0, begun + patience - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"{name} did not stop within {patience:g} s of SIGTERM; killing it")
                os.killpg(popen.pid, signal.SIGKILL)
                popen.wait()


def grace_seconds() -> float:
    """BRIDGE_GRACE_SECONDS: what a worker gives its engine to leave."""
    try:
        return float(os.environ.get("BRIDGE_GRACE_SECONDS") or 30.0)
    except ValueError:
        return 30.0


def stop_leftovers(home: Home) -> list[str]:
    """Stops children of a supervisor that was killed before it could stop them itself; returns
    their names."""
    state = home.state()
    if state is None:
        return []
    names = [name for name, process in state.children.items() if process.alive()]
    left = [state.children[name] for name in names]
    for process in left:
        os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds() + 10.0
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [process for process in left if process.alive()]
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
    home.forget()
    return names


def make_way(home: Home, port: int, host: str, say: Callable[[str], Any]) -> None:
    """Stops what a killed supervisor has left, then raises unless a server can listen on the port,
    which until then was theirs. For whoever holds the home's lock."""
    left = stop_leftovers(home)
    if left:
        say(f"Stopped what a killed supervisor had left running: {', '.join(left)}")
    check_port(home, port, host)


def check_port(home: Home, port: int, host: str = ports.LOOPBACK) -> None:
    """Raises unless a server can listen there."""
    if not ports.is_free(port, host):
        raise CannotStartError(
            f"Port {port} is taken by {ports.holder(port)}: stop that, or choose another one with "
            f"`{hints.up(home, ports.free_port(port + 1))}`.",
            status=2,
        )


def serve(
    home: Home, port: int, host: str = ports.LOOPBACK, say: Callable[[str], Any] = print
) -> int:
    """Supervises a service in this home, in this process, until it is told to stop."""
    with home.lock() as lock:
        if lock is None:
            running = home.running()
            where = f" at {running.url}" if running else ""
            raise CannotStartError(f"Bridge already runs in {home.path}{where}.", status=0)
        make_way(home, port, host, say)
        return Supervisor(home, port, host, say).run()


def detach(
    home: Home, port: int, host: str = ports.LOOPBACK, say: Callable[[str], Any] = print
) -> State:
    """Starts a supervisor as a process of its own, or waits for the one that was started meanwhile;
    returns when the service is ready."""
    deadline = time.monotonic() + 2 * READY_WITHIN + 10
    while time.monotonic() < deadline:
        with home.lock() as lock:
            if lock is not None:
                make_way(home, port, host, say)
                return _leave_behind(home, port, host, lock, deadline)
        state = home.running()
        if state and state.ready:
            return state
        time.sleep(0.1)
    raise CannotStartError(f"Another start in {home.path} does not end; see {home.logs}")


def _leave_behind(home: Home, port: int, host: str, lock: int, deadline: float) -> State:
    """A supervisor that goes on without us. It inherits the lock, so that from our look at the port
    to its end nobody else can start one."""
    with home.log("bridge").open("ab") as log:
        begin = log.tell()
        daemon = subprocess.Popen(
            [
                *(sys.executable, "-m", "bridge_client.supervisor", "--home", str(home.path)),
                *("--port", str(port), "--host", host, "--lock", str(lock)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
    while daemon.poll() is None and time.monotonic() < deadline:
        state = home.running()
        if state and state.ready:
            return state
        time.sleep(0.1)
    with home.log("bridge").open("rb") as log:
        log.seek(begin)
        said = log.read().decode(errors="replace").strip()
    raise CannotStartError(said or f"Bridge did not start; see {home.logs}", daemon.returncode or 1)


@dataclass(frozen=True)
class Stopped:
    """What `stop` has stopped."""

    url: str
    leftovers: tuple[str, ...] = ()
    """Children whose supervisor had been killed; none in the usual course."""


def stop(home: Home) -> Stopped | None:
    """Stops the service of this home; None if nothing ran."""
    state = home.running()
    if state is None:
        written = home.state()
        if written is None:
            return None
        with home.lock() as lock:  # whoever else has it starts anew, and stops them itself
            left = [] if lock is None else stop_leftovers(home)
        return Stopped(written.url, tuple(left)) if left else None
    os.kill(state.supervisor.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds() + 30.0
    while state.supervisor.alive():
        if time.monotonic() > deadline:
            raise CannotStartError(
                f"the supervisor (pid {state.supervisor.pid}) did not stop; see {home.logs}"
            )
        time.sleep(0.1)
    return Stopped(state.url)


def main(arguments: list[str] | None = None) -> int:
    """The detached supervisor."""
    parser = argparse.ArgumentParser(prog="python -m bridge_client.supervisor")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--lock", type=int, required=True, help="the home's, which we inherit")
    options = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)

    try:
        return Supervisor(Home(options.home), options.port, options.host, say).run()
    except CannotStartError as error:
        print(error, flush=True)
        return error.status


if __name__ == "__main__":
    raise SystemExit(main())
