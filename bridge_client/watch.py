"""Shows a job as it runs: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridge_client.models import Event, Job
from bridge_client.text import escape, plain

LINES = 20
"""Outside a terminal, about this many lines tell of the steps of a run."""

GAP = "  "

HEADLINES = ("reward", "accuracy", "gain", "sft/nll")
"""The figures worth a look, in this order. GRPO's loss is not among them: it tells nothing."""


class Watch:
    """A job's progress on a console (standard error, unless told otherwise)."""

    def __init__(self, job: Job, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._job = job
        self._steps = job.steps or int(job.spec.get("steps") or 0)
        self._figures: dict[str, float] = {}
        self._told = 0
        self._bar = 24 if self.console.width >= 100 else 10
        self._live: Progress | None = None
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=self._bar),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._live.add_task(
                escape(job.status), total=self._steps or None, figures=""
            )

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def see(self, event: Event) -> None:
        """Shows one event."""
        if event.type == "phase":
            self._count(event.get("steps"))
            self._phase(str(event.get("phase")))
        elif event.type == "metric":
            self._metric(event.step or 0, event.get("metrics") or {})
        elif event.type == "resume":
            self._line(f"resumed from step {event.step}")
            self._advance(event.step or 0)
        elif event.type == "checkpoint":
            self._checkpoint(event)
        elif event.type == "log" and event.get("level") != "info":
            self._line(f"{event.get('level')}: {event.get('message')}")
        elif event.type == "error":
            self._line(f"failed: {event.get('message')}")
        elif event.type == "done":
            self._advance(event.step or self._steps)
            self._describe("done")

    def _count(self, steps: int | None) -> None:
        """An evaluation's problems are counted once they have been read."""
        if steps:
            self._steps = steps
            if self._live:
                self._live.update(self._task, total=steps)

    def _phase(self, phase: str) -> None:
        self._describe(phase)
        if not self._live:
            self._line(phase)

    def _metric(self, step: int, metrics: dict[str, float | None]) -> None:
        self._figures.update({k: v for k, v in metrics.items() if v is not None})
        self._advance(step)
        if metrics.get("accuracy") is not None:
            self._line(f"{self._at(step)}  held-out accuracy {interval(self._figures)}")
        elif not self._live and self._is_due(step, metrics):
            self._told = step
            self._line(f"{self._at(step)}  {figures(_without_accuracy(metrics))}".rstrip())

    def _is_due(self, step: int, metrics: dict[str, float | None]) -> bool:
        """Of an evaluation's steps only those that have a score, and each that ends a set."""
        due = step >= self._told + max(1, self._steps // LINES)
        if self._job.kind != "eval":
            return due
        return any(name.endswith("/pass@1/low") for name in metrics) or (due and bool(metrics))

    def _checkpoint(self, event: Event) -> None:
        best = ", the best so far" if event.get("best") else ""
        self._line(f"{self._at(event.step or 0)}  checkpoint saved{best}")

    def _at(self, step: int) -> str:
        width = len(str(self._steps))
        what = "problem" if self._job.kind == "eval" else "step"
        return f"{what} {step:>{width}}/{self._steps}"

    def _advance(self, step: int) -> None:
        if self._live:
            self._live.update(self._task, completed=step, figures=self._fitting())

    def _fitting(self) -> str:
        """As many figures as there is room for beside the rest, of which nothing may be cut."""
        taken = (10, self._bar, 2 * len(str(self._steps)) + 1, len("100:00:00"))
        room = self.console.width - sum(taken) - len(taken)
        parts = [plain(part) for part in headlines(self._figures)]
        while parts and len(GAP.join(parts)) > room:
            parts.pop()
        return GAP.join(parts)

    def _describe(self, what: str) -> None:
        if self._live:
            self._live.update(self._task, description=escape(what))

    def _line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


def figures(values: dict[str, float]) -> str:
    """The headline figures in a few words: `reward 0.41  accuracy 0.45  gain +0.012`."""
    return GAP.join(headlines(values))


def headlines(values: dict[str, float]) -> list[str]:
    """Each of them, the first the most worth a look."""
    parts = []
    for name in HEADLINES:
        if name in values:
            sign = "+" if name == "gain" else ""
            digits = 3 if name == "gain" else 2
            parts.append(f"{name} {values[name]:{sign}.{digits}f}")
    for name, value in values.items():
        if name.startswith("eval/") and name.endswith("/pass@1"):
            parts.append(f"{name.removeprefix('eval/')} {percent(value)}")
    return parts


def _without_accuracy(metrics: dict[str, float | None]) -> dict[str, float]:
    """The figures of one step; accuracy is measured rarely and has lines of its own."""
    return {k: v for k, v in metrics.items() if v is not None and k != "accuracy"}


def percent(value: Any) -> str:
    return "?" if value is None else f"{100 * float(value):.1f} %"


def interval(values: dict[str, float]) -> str:
    """An accuracy with its 95 % interval, both in percent."""
    low, high = values.get("accuracy/low"), values.get("accuracy/high")
    return percent(values["accuracy"]) + bounds([low, high])


def bounds(ci: Any) -> str:
    """` (95 %: 39.1 to 51.3)`; nothing where no interval is known."""
    if not ci or None in ci:
        return ""
    return f" (95 %: {100 * ci[0]:.1f} to {100 * ci[1]:.1f})"
