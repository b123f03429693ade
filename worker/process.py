"""The engine as a process: started, asked to leave, made to leave.

It leads a process group of its own, and whatever it starts is found again by a word in its
environment (`family`), so that all goes with it. It holds the read end of a pipe whose write end is
ours: when this worker dies, however suddenly, the engine reads end-of-file and stops. And it sees
the lease's deadline, and stops when that has passed (`bridge_engine.process.lifeline`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bridge_engine.process.lifeline import Deadline
from service.store import breakdown
from worker.family import WORD, end_family

OURS = (
    "BRIDGE_DATABASE_URL",
    "BRIDGE_REDIS_URL",
    "BRIDGE_ARTIFACTS_URL",
    "BRIDGE_INFERENCE_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Passwords may be in these, and the engine knows no database, queue, artifact store or gateway."""


class Engine:
    """A running engine. Leaving the `with` block ends it and everything it started."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, word: str) -> None:
        self._process = process
        self._pipe = pipe
        self.word = word
        """What the environment of all its processes carries: see `family`."""
        self._kill_at: float | None = None
        self._asked = False

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        spec: Path,
        run: Path,
        *,
        lock: int,
        deadline: Deadline,
        environment: Mapping[str, str],
    ) -> Engine:
        """Starts `COMMAND run SPEC --dir RUN --parent-pipe FD --deadline FD`; its output goes to
        RUN/engine.log.

        `lock` is the run directory's lock, which passes to the engine: see `rundir`.
        """
        read, write = os.pipe()
        word = secrets.token_hex(8)
        inherited = {k: v for k, v in os.environ.items() if k not in OURS}
        arguments = ["run", str(spec), "--dir", str(run), "--parent-pipe", str(read)]
        arguments += ["--deadline", str(deadline.descriptor)]
        try:
            with (run / "engine.log").open("ab") as output:
                process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**inherited, "PYTHONUNBUFFERED": "1", **environment, WORD: word},
                    pass_fds=(read, lock, deadline.descriptor),
                    start_new_session=True,
                )
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        return cls(process, write, word)

    @property
    def pid(self) -> int:
        """Of the engine, and of its process group."""
        return self._process.pid

    @property
    def asked_to_stop(self) -> bool:
        """We have sent SIGTERM."""
        return self._asked

    @property
    def is_leaving(self) -> bool:
        """It was told to leave, or has said that it does; the grace decides."""
        return self._kill_at is not None

    def stop(self, grace_seconds: float) -> None:
        """Asks the engine to save and leave, once; kills it when the grace is over."""
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)
            self.expect_exit(grace_seconds)

    def expect_exit(self, grace_seconds: float) -> None:
        """It should be on its way out; kills it when the grace is over."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + grace_seconds

    def wait(self, seconds: float) -> int | None:
        """Waits this long for the engine to end; its exit status, or None if it still runs."""
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Ends all of its processes at once."""
        self._signal(signal.SIGKILL)
        end_family(self.word)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()  # also what the engine may have left behind
        self._process.wait()
        os.close(self._pipe)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
            os.killpg(self._process.pid, number)


def death(returncode: int, log: Path, *, memory_counted: bool) -> dict[str, Any]:
    """The error of an engine that ended without a word, from its exit status and its last line.

    `memory_counted`: the kernel was asked whether it killed for want of memory, and had not.
    """
    last = _last_line(log)
    said = f" Its last line was: {last}" if last else ""
    if returncode == -signal.SIGKILL:
        return breakdown(
            "infra",
            "engine_killed",
            "The engine was killed (signal 9), and not by this worker. "
            + (
                "The kernel counts no kill for want of memory."
                if memory_counted
                else "It may have been for want of memory: this system does not count such kills."
            )
            + said,
        )
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return breakdown(
            "internal", "engine_crashed", f"The engine was ended by {name}; see engine.log.{said}"
        )
    return breakdown(
        "internal",
        "engine_exited",
        f"The engine left with exit status {returncode} and no word of why; see engine.log.{said}",
    )


def _last_line(log: Path, most: int = 300) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[-most:] for line in reversed(lines) if line.strip()), "")
