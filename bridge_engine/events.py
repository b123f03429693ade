"""What a run tells the world: typed events, one JSON object a line in `events.jsonl`.

The engine appends, the worker reads; neither waits for the other. `seq` rises by one for ever, over
restarts too: an event is known by (run, seq), so forwarding it twice is harmless.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from bridge_engine.errors import Category
from bridge_engine.process import lifeline


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seq: int = 0
    """Position in this run's stream, from 1."""
    time: float = 0.0
    """Seconds since the epoch, by the engine's clock."""


class Phase(_Event):
    """The run entered a new phase."""

    type: Literal["phase"] = "phase"
    phase: Literal["loading", "evaluating", "training", "exporting"]
    steps: int | None = None
    """Steps of the whole run, where they are not known before its data is."""


class Resume(_Event):
    """The run continues from `step`: whatever was reported for later steps is void."""

    type: Literal["resume"] = "resume"
    step: int


class Metric(_Event):
    """Figures of one step. `step` counts finished optimisation steps; 0 is before training."""

    type: Literal["metric"] = "metric"
    step: int
    metrics: dict[str, float | None]
    """None stands for a figure that is not a number; JSON has no NaN."""


class Sample(_Event):
    """One completion the policy wrote, as a person can read it."""

    type: Literal["sample"] = "sample"
    step: int
    source: Literal["rollout", "eval"]
    problem: str
    completion: str
    gold: str
    reward: float | None
    """1 right, 0 wrong, None unjudged."""


class Checkpoint(_Event):
    """A whole checkpoint lies on disk; the paths are relative to the run directory."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    """Resumable state."""
    adapter: str | None = None
    """The policy as a PEFT adapter; None: a full student without `export.svd_rank`."""
    sha256: str | None = None
    """Of the adapter's weights file."""
    rank: int | None = None
    relative_error: float | None = None
    """Of an adapter that was cut out of a full student; None: it is exact."""
    student: str | None = None
    """The student alone as a PEFT adapter, for methods with a teacher."""
    student_sha256: str | None = None
    student_rank: int | None = None
    student_accuracy: float | None = None
    merged: str | None = None
    """The policy as a whole model; at the last and at the best step, where there is one."""
    merged_sha256: str | None = None
    """Of its manifest."""
    merged_student: str | None = None
    """The student alone as a whole model, where it was trained as one."""
    merged_student_sha256: str | None = None
    accuracy: float | None = None
    """Held-out accuracy at this step, where it was measured."""
    template: dict[str, Any] | None = None
    """How a problem becomes a prompt for what is exported (`TemplateSpec`, with `auto` decided)."""
    best: bool = False
    """True if no measurement so far was higher."""


class Log(_Event):
    """A line for a person."""

    type: Literal["log"] = "log"
    level: Literal["info", "warning", "error"] = "info"
    message: str


class Done(_Event):
    """The run reached its end; the last event of a successful run."""

    type: Literal["done"] = "done"
    step: int
    result: dict[str, Any]
    """accuracy_before, accuracy_after, their 95 % intervals, best_step, seconds, …"""


class Stopped(_Event):
    """The run was asked to stop, saved its state and left."""

    type: Literal["stopped"] = "stopped"
    step: int


class Failed(_Event):
    """The run failed; the last event of a failed run."""

    type: Literal["error"] = "error"
    step: int | None
    category: Category
    code: str
    message: str
    param: str | None = None
    retryable: bool = False


Event = Phase | Resume | Metric | Sample | Checkpoint | Log | Done | Stopped | Failed
_parse: TypeAdapter[Event] = TypeAdapter(Event)

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75
"""The engine's exit status after SIGTERM: state saved, run again to go on (EX_TEMPFAIL)."""


def parse(line: str | bytes) -> Event:
    """One line of `events.jsonl` as an event."""
    return _parse.validate_json(line)


class EventWriter:
    """Appends events to `DIR/events.jsonl`, and each step's figures to `DIR/metrics.jsonl`.

    A torn last line (the process died while writing) is cut off on opening, so that every line of
    the file is a whole event.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "events.jsonl"
        self.metrics_path = directory / "metrics.jsonl"
        self._seq = _repair(self.path)
        self.started_before = self._seq > 0
        """True if an earlier process has already reported from this directory."""
        _repair(self.metrics_path)

    def emit(self, event: Event) -> None:
        """Numbers the event, stamps it and appends it in one write.

        Ends the process instead if its worker's lease has run out.
        """
        lifeline.check()
        event.seq, event.time = self._seq + 1, time.time()
        if isinstance(event, Metric):
            event.metrics = {k: _json_number(v) for k, v in event.metrics.items()}
            _append(self.metrics_path, json.dumps({"step": event.step, **event.metrics}))
        if isinstance(event, Resume):
            self._forget_after(event.step)
        _append(self.path, event.model_dump_json())
        self._seq += 1

    def _forget_after(self, step: int) -> None:
        """Drops the figures of steps that will be computed again."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.metrics_path)


class EventReader:
    """Reads whole events as they are appended; remembers where it was."""

    def __init__(self, path: Path, after_seq: int = 0) -> None:
        self.path = path
        self._offset = 0
        self._after = after_seq

    def read(self, limit: int = 1000) -> list[Event]:
        """Up to `limit` events that have come since the last call."""
        events: list[Event] = []
        if not self.path.exists():
            return events
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in _whole_lines(file):
                self._offset += len(line)
                event = parse(line)
                if event.seq > self._after:
                    events.append(event)
                if len(events) >= limit:
                    break
        return events


def _whole_lines(file: Any) -> Iterator[bytes]:
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield line


def _repair(path: Path) -> int:
    """Cuts a torn last line off; returns the last whole line's seq (0 if none)."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    last = whole.rstrip(b"\n").rpartition(b"\n")[2]
    return int(json.loads(last).get("seq", 0)) if last else 0


def _append(path: Path, line: str) -> None:
    """Appends a whole line or, on a full disk, nothing: half of one would hide all that follow."""
    data = line.encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def _json_number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
