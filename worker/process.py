"""The engine as a process: started, asked to leave, made to leave.

It leads a process group of its own, so that whatever it starts goes with it, and holds the read end
of a pipe whose write end is ours: when this worker dies, however suddenly, the engine reads
end-of-file and stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from service.store import breakdown

_OURS = (
    "BRIDGE_DATABASE_URL",
    "BRIDGE_REDIS_URL",
    "BRIDGE_ARTIFACTS_URL",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
"""Passwords may be in these, and the engine knows no database, queue or artifact store."""


class Engine:
    """A running engine. Leaving the `with` block ends it and everything it started."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int) -> None:
        self._process = process
        self._pipe = pipe
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
        environment: Mapping[str, str],
    ) -> Engine:
        """Starts `COMMAND run SPEC --dir RUN --parent-pipe FD`; its output goes to RUN/engine.log.

        `lock` is the run directory's lock, which the engine holds together with us: see `rundir`.
        """
        read, write = os.pipe()
        inherited = {k: v for k, v in os.environ.items() if k not in _OURS}
        arguments = ["run", str(spec), "--dir", str(run), "--parent-pipe", str(read)]
        try:
            with (run / "engine.log").open("ab") as output:
                process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
                    pass_fds=(read, lock),
                    start_new_session=True,
                )
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        return cls(process, write)

    @property
    def pid(self) -> int:
        """Of the engine, and of its process group."""
        return self._process.pid

    @property
    def asked_to_stop(self) -> bool:
        """We have sent SIGTERM."""
        return self._asked

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
        """Ends the whole group at once."""
        self._signal(signal.SIGKILL)

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


def death(returncode: int, log: Path) -> dict[str, Any]:
    """The error of an engine that ended without a word, from its exit status and its last line."""
    last = _last_line(log)
    said = f" Its last line was: {last}" if last else ""
    if returncode == -signal.SIGKILL:
        return breakdown(
            "oom",
            "engine_killed",
            "The engine was killed (signal 9), most likely because memory ran out; if it happens "
            "again, lower rollout.batch_size or runtime.micro_batch, or take a smaller model."
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
