"""A pool of killable processes that judge answers, each answer within a limit of time and memory.

math-verify's own time limits are signals: they fail outside the main thread and cannot stop some
inputs at all. Here the limit is SIGKILL by the parent, once the child has computed for so long:
what a busy machine, or one that stood still, kept from it does not count, or a verdict would hang
on who else was there. A child that dies or is late is replaced, its question is answered
"unjudged", and every other question is answered as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

import bridge_engine
from bridge_engine.errors import EngineError

MEMORY_BYTES = 1 << 30
"""Address space of a child. math-verify itself needs about 64 MiB."""

_PASSED_ON = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
    | {"BRIDGE_ENGINE_ID"}  # by which a worker finds what an engine left behind
)
"""Environment variables a child is given."""

PATIENCE = 10.0
"""So many times the limit may pass by the clock: a child that does not compute ends then."""
START_SECONDS = 120.0
"""A child that is not ready by then never will be (importing sympy takes about one second)."""


@dataclass(frozen=True)
class Question:
    """Is `stated` the answer `gold`? Both are answers, not completions."""

    gold: str
    stated: str
    tolerance: float | None = None
    """Relative, where the gold answer is a measured number."""


@dataclass(frozen=True)
class Judgement:
    """`value` is None where the question could not be decided; `reason` says why, in a word of
    `bridge_engine.rewards.findings`."""

    value: bool | None
    reason: str


@dataclass(eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    account: psutil.Process
    """What the kernel says of it."""
    stderr: IO[bytes]
    deadline: float
    """When it has to have said something (time.monotonic), or is looked at again."""
    asked: float = 0.0
    """When its question was put to it."""
    computed: float = 0.0
    """Seconds of CPU time that it had taken by then."""
    ready: bool = False
    task: int | None = None
    """Index of the question it is working on."""
    outgoing: bytes = b""
    incoming: bytearray = field(default_factory=bytearray)

    @property
    def reads(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def writes(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()


class Pool:
    """Up to `workers` children, started when the first question comes.

    Not for use by two threads at once.
    """

    def __init__(
        self, timeout_s: float, *, workers: int = 1, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.timeout_s = timeout_s
        self.workers = workers
        self.memory_bytes = memory_bytes
        self._children: list[_Child] = []

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement a question, in order."""
        waiting = deque(range(len(questions)))
        judged: dict[int, Judgement] = {}
        while len(judged) < len(questions):
            missing = len(questions) - len(judged)
            self._bury_the_idle_dead()
            while len(self._children) < min(self.workers, missing):
                self._children.append(self._start())
            for child in self._children:
                if child.ready and child.task is None and waiting:
                    self._ask(child, waiting.popleft(), questions)
            self._wait()
            for child in list(self._children):
                task = child.task
                answer = self._hear(child)
                if answer is not None and task is not None:
                    judged[task] = answer
        return [judged[index] for index in range(len(questions))]

    def close(self) -> None:
        """Ends every child."""
        for child in list(self._children):
            self._end(child)

    @property
    def pids(self) -> list[int]:
        """Process ids of the children alive now."""
        return [child.process.pid for child in self._children]

    def _start(self) -> _Child:
        root = str(Path(bridge_engine.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # What the child works on was written by a model: it gets no token or key that lies about.
        # The hash seed is fixed because sympy's order of terms, hence its answer, can hang on it.
        environment = {k: v for k, v in os.environ.items() if k in _PASSED_ON}
        environment |= {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        process = subprocess.Popen(
            [sys.executable, "-m", "bridge_engine.rewards.child", str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env=environment,
        )
        account = psutil.Process(process.pid)
        child = _Child(process, account, stderr, time.monotonic() + START_SECONDS)
        os.set_blocking(child.reads, False)
        os.set_blocking(child.writes, False)
        return child

    def _ask(self, child: _Child, task: int, questions: Sequence[Question]) -> None:
        question = questions[task]
        message = {**asdict(question), "seconds": self.timeout_s}
        child.task, child.asked, child.computed = task, time.monotonic(), _computed(child)
        child.deadline = child.asked + self.timeout_s
        child.outgoing = json.dumps(message).encode() + b"\n"
        _send(child)

    def _bury_the_idle_dead(self) -> None:
        """A child killed from outside between questions must not cost the next one its verdict."""
        for child in list(self._children):
            if child.ready and child.task is None and child.process.poll() is not None:
                self._end(child)

    def _wait(self) -> None:
        """Sleeps until a child has something to say or to take, or is late."""
        busy = [child for child in self._children if not child.ready or child.task is not None]
        with selectors.DefaultSelector() as selector:
            for child in busy:
                selector.register(child.reads, selectors.EVENT_READ)
                if child.outgoing:
                    selector.register(child.writes, selectors.EVENT_WRITE)
            first = min(child.deadline for child in busy)
            selector.select(max(0.0, first - time.monotonic()))

    def _hear(self, child: _Child) -> Judgement | None:
        """What a child has to say, if anything; a child that is late or dead is ended."""
        _send(child)
        message, dead = _receive(child)
        if message is not None and not child.ready:
            child.ready = True
            return None
        if message is not None:
            child.task = None
            return Judgement(message["value"], message["reason"])
        late = time.monotonic() >= child.deadline and (not child.ready or child.task is not None)
        if not dead and (not late or self._has_time_left(child)):
            return None
        if not child.ready:
            raise self._never_ready(child)
        self._end(child)
        return Judgement(None, "process_died" if dead else "timed_out")

    def _has_time_left(self, child: _Child) -> bool:
        """Of a child that is late by the clock; sets when it is to be looked at again."""
        left = self.timeout_s - (_computed(child) - child.computed)
        end = child.asked + PATIENCE * self.timeout_s
        now = time.monotonic()
        if not (child.ready and left > 0 and now < end):
            return False
        child.deadline = min(now + max(left, 0.05), end)
        return True

    def _never_ready(self, child: _Child) -> EngineError:
        code = self._end(child, keep_stderr=True)
        child.stderr.seek(0)
        said = child.stderr.read().decode(errors="replace").strip().splitlines()
        child.stderr.close()
        return EngineError(
            f"the process that judges answers did not start (exit status {code}: "
            f"{said[-1] if said else 'it said nothing'}); is math-verify installed, and is there "
            f"{self.memory_bytes >> 20} MiB of memory?",
            code="verifier_failed",
            category="infra",
        )

    def _end(self, child: _Child, *, keep_stderr: bool = False) -> int:
        self._children.remove(child)
        process = child.process
        process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        if not keep_stderr:
            child.stderr.close()
        return code


def _computed(child: _Child) -> float:
    """Seconds of CPU time that it has taken; endless for one that cannot be asked any more."""
    try:
        times = child.account.cpu_times()
    except psutil.Error:
        return math.inf
    return float(times.user + times.system)


def _send(child: _Child) -> None:
    """Writes as much of the question as the pipe takes."""
    while child.outgoing:
        try:
            written = os.write(child.writes, child.outgoing)
        except BlockingIOError:
            return
        except BrokenPipeError:
            child.outgoing = b""  # it is dead, which reading will show
            return
        child.outgoing = child.outgoing[written:]


def _receive(child: _Child) -> tuple[dict[str, Any] | None, bool]:
    """(a whole message if one has come, is the child dead)."""
    while b"\n" not in child.incoming:
        try:
            data = os.read(child.reads, 65536)
        except BlockingIOError:
            return None, False
        if not data:
            return None, True
        child.incoming += data
    line, _, rest = bytes(child.incoming).partition(b"\n")
    child.incoming = bytearray(rest)
    message: dict[str, Any] = json.loads(line)
    return message, False
