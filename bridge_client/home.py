"""HOME, the folder of an embedded service: who runs in it, and where it answers.

`up.lock` is held by the supervisor for as long as it lives, so that two can never share a home;
`pids.json` says what it started. A process is known by pid *and* start time: pids are used again,
and nothing may ever be stopped that was not started here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bridge_client.errors import CannotStartError

LOG_NAMES = ("bridge", "service", "worker", "inference")


def default_home() -> Path:
    """BRIDGE_HOME, or `.bridge` in the working directory; absolute."""
    return Path(os.environ.get("BRIDGE_HOME") or ".bridge").expanduser().resolve()


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one with the same pid."""

    pid: int
    started: float
    """Seconds since the epoch, by the kernel's account: it moves when the clock is set."""
    boot: str = ""
    """Of which boot of the machine, where the kernel says that, and so many seconds after it: these
    do not move."""
    after: float = 0.0

    @classmethod
    def of(cls, pid: int) -> Process:
        process = psutil.Process(pid)
        return cls(pid, process.create_time(), _boot(), _after_boot(process))

    def alive(self) -> bool:
        """Does this very process still run? A zombie does not."""
        try:
            process = psutil.Process(self.pid)
            if self.boot:
                same = self.boot == _boot() and abs(_after_boot(process) - self.after) < 1.0
            else:
                same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _after_boot(process: psutil.Process) -> float:
    return float(process.create_time() - psutil.boot_time())


@dataclass(frozen=True)
class State:
    """What `pids.json` says."""

    url: str
    inference_url: str
    supervisor: Process
    children: dict[str, Process] = field(default_factory=dict)
    ready: bool = False

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> State:
        return cls(
            url=body["url"],
            inference_url=body["inference_url"],
            supervisor=Process(**body["supervisor"]),
            children={name: Process(**child) for name, child in body["children"].items()},
            ready=body["ready"],
        )


class Home:
    """One such folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_home()).expanduser().resolve()
        self.logs = self.path / "logs"
        self.pids = self.path / "pids.json"
        self._lock = self.path / "up.lock"

    def create(self) -> None:
        """Makes the folder, readable for its owner alone, and keeps it out of git. Raises
        CannotStartError where there can be none."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.logs.mkdir(exist_ok=True)
            self._lock.touch()
            ignore = self.path / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
        except OSError as error:
            raise CannotStartError(
                f"{self.path} cannot be the folder of a service ({error.strerror}): choose one "
                "that can be written, with --home or BRIDGE_HOME.",
                status=2,
            ) from None

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def state(self) -> State | None:
        """What was last written about this home's processes, whether they still run or not."""
        try:
            return State.from_json(json.loads(self.pids.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def running(self) -> State | None:
        """The service that runs in this home now, None if none does."""
        state = self.state()
        return state if state and state.supervisor.alive() else None

    def answering(self) -> State | None:
        """The service that can be asked in this home: the one that runs, or one that outlives a
        supervisor that was killed."""
        state = self.state()
        if state is None:
            return None
        processes = (state.supervisor, state.children.get("service"))
        return state if any(process and process.alive() for process in processes) else None

    def write(self, state: State) -> None:
        """Replaces `pids.json` in one step: a reader never sees half of it."""
        temporary = self.pids.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(state), indent=2) + "\n")
        os.replace(temporary, self.pids)

    def forget(self) -> None:
        self.pids.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[int | None]:
        """Makes this process the home's only supervisor and yields the lock's descriptor, which a
        child may inherit to stay it; None where another one is."""
        import fcntl  # Windows has none, and no need of it: there the client is used alone

        self.create()
        with self._lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file.fileno()

    def tail(self, name: str, lines: int = 15) -> str:
        """The end of one process's log."""
        try:
            return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""
