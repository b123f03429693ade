"""What can befall the house: each fault's name, what it does, and how a seed chooses among them."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from celery import Celery
from kombu.exceptions import OperationalError

from bridge_engine.process.failpoints import KILL, RAISE, STOP
from service.store import StoreUnavailable
from tests.faults.house import House, Part

PROCESSES = ("worker", "engine", "api", "relay", "redis", "postgres")
FAILPOINTS = {
    "after_claim": (KILL, STOP, RAISE),
    "before_heartbeat": (KILL, STOP, RAISE),
    # Of the engine, whose exceptions end the job, as they should.
    "in_checkpoint": (KILL, STOP),
    "between_checkpoint_and_row": (KILL, STOP),
    "after_done_before_recorded": (KILL, STOP, RAISE),
}
KINDS = (
    *(f"{how} {who}" for who in PROCESSES for how in ("kill", "stop")),
    *(f"{name}: {how}" for name, hows in FAILPOINTS.items() for how in hows),
    "message lost",
    "message delivered three times",
    "clock jump",
    "network cut",
    "network held up",
)
"""All but the full disk, which has a test of its own: a job that meets one ends, as it should."""


@dataclass(frozen=True)
class Fault:
    """One thing that happens, `delay` seconds after the one before."""

    kind: str
    delay: float
    which: int
    """Of the workers, where one of them is meant."""
    seconds: float
    """How long it lasts, where it lasts: less or more than a lease."""

    def __str__(self) -> str:
        return f"after {self.delay:.2f} s: {self.kind} ({self.which}, {self.seconds:.1f} s)"


def plan(seed: int, count: int) -> list[Fault]:
    """The faults of a round: a function of the seed. Rounds that follow one another go through all
    kinds before one comes again."""
    faults = []
    for index in range(seed * count, (seed + 1) * count):
        cycle, place = divmod(index, len(KINDS))
        random.Random(cycle).shuffle(order := list(KINDS))
        rng = random.Random(index)
        lasts = rng.choice([rng.uniform(0.3, 2.0), rng.uniform(7.0, 10.0)])
        faults.append(Fault(order[place], rng.uniform(0.2, 2.5), rng.randrange(2), lasts))
    return faults


class Injector:
    """Does faults to a house, and undoes those that last."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._later: list[threading.Timer] = []
        self._app = Celery("faults", broker=house.broker_url, set_as_current=False)

    def inject(self, fault: Fault) -> bool:
        """Does it; False if there was nothing that it could befall."""
        house, (first, _, second) = self._house, fault.kind.partition(" ")
        if first in ("kill", "stop") and second == "engine":
            return self._engine(first, fault)
        if first in ("kill", "stop"):
            parts = {part.name: part for part in house.parts}
            part = house.workers[fault.which] if second == "worker" else parts[second]
            return (self._kill if first == "kill" else self._stop)(part, fault)
        if ": " in fault.kind:
            return self._failpoint(*fault.kind.split(": "), fault)
        return {
            "message lost": self._lose,
            "message delivered three times": self._thrice,
            "clock jump": self._jump,
            "network cut": self._cut,
            "network held up": self._hold_up,
        }[fault.kind](fault)

    def finish(self) -> None:
        """Nothing that was to happen later is left to happen."""
        for timer in self._later:
            timer.join()
        self._later.clear()

    def _after(self, seconds: float, work: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, work)
        timer.daemon = True
        timer.start()
        self._later.append(timer)

    # ------------------------------------------------------------------ each of them

    def _kill(self, part: Part, fault: Fault) -> bool:
        part.kill()
        # Another worker or none at all, for a moment or for longer than a lease.
        again = part.start if part.name.startswith("worker") else self._start_again(part)
        self._after(min(fault.seconds, 3.0), again)
        return True

    def _start_again(self, part: Part) -> Callable[[], object]:
        servers = (self._house.postgres, self._house.redis)
        return self._house.start_servers if part in servers else part.start

    def _stop(self, part: Part, fault: Fault) -> bool:
        # Postgres is a process for every connection; a worker's engines are processes of their own.
        processes = part.tree() if part.name == "postgres" else part.tree()[:1]
        if not processes:
            return False
        _each(processes, psutil.Process.suspend)
        self._after(fault.seconds, lambda: _each(processes, psutil.Process.resume))
        return True

    def _engine(self, how: str, fault: Fault) -> bool:
        until = time.monotonic() + 15
        while not (engines := self._house.engines()):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        engine = engines[fault.which % len(engines)]
        if how == "kill":
            _each([engine], psutil.Process.kill)
        else:
            _each([engine], psutil.Process.suspend)
            self._after(fault.seconds, lambda: _each([engine], psutil.Process.resume))
        return True

    def _failpoint(self, name: str, action: str, fault: Fault) -> bool:
        armed = self._house.failpoints / name
        partial = armed.with_name(f".arming-{name}")
        partial.write_text(action)
        os.rename(partial, armed)
        until = time.monotonic() + 30
        while armed.exists():
            if time.monotonic() > until:
                armed.unlink(missing_ok=True)
                return False
            time.sleep(0.05)
        if action == STOP:
            self._after(fault.seconds, self._wake)
        # A worker that killed itself is started again as its container would be.
        self._after(1.5, lambda: [part.start() for part in self._house.workers])
        return True

    def _wake(self) -> None:
        """Whoever stopped itself at a failpoint goes on."""
        parts = [process for part in self._house.workers for process in part.tree()[:1]]
        _each([*parts, *self._house.engines()], psutil.Process.resume)

    def _lose(self, _: Fault) -> bool:
        with contextlib.suppress(Exception):
            self._house.broker.flushall()
            return True
        return False

    def _thrice(self, _: Fault) -> bool:
        with contextlib.suppress(OperationalError, OSError, StoreUnavailable):
            jobs, _ = self._house.store.list_jobs(limit=4)
            for job in jobs * 3:
                self._app.send_task("run_job", args=[job.id], queue="bridge", retry=False)
            return True
        return False

    def _jump(self, fault: Fault) -> bool:
        by = 86_400 if fault.which else -86_400
        self._house.clock.write_text(str(by))
        self._after(fault.seconds, lambda: self._house.clock.write_text("0"))
        return True

    def _cut(self, fault: Fault) -> bool:
        network = self._house.networks[fault.which]
        network.cut()
        self._after(fault.seconds, network.heal)
        return True

    def _hold_up(self, fault: Fault) -> bool:
        network = self._house.networks[fault.which]
        network.hold_up()
        self._after(fault.seconds, network.heal)
        return True


def _each(processes: list[psutil.Process], work: Callable[[psutil.Process], object]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            work(process)
