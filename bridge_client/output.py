"""What the commands print: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel
from rich import markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge_client.models import Adapter, Generation, Job, Metrics
from bridge_client.text import escape, plain
from bridge_client.watch import GAP, bounds, figures, percent

EXIT_FAILED, EXIT_USAGE, EXIT_CANCELLED, EXIT_UNREACHABLE, EXIT_DETACHED = 1, 2, 3, 4, 130
EXIT_OF_JOB = {"succeeded": 0, "failed": EXIT_FAILED, "cancelled": EXIT_CANCELLED}

STYLES = {
    **{"succeeded": "green", "failed": "red", "running": "cyan"},
    **{"paused": "yellow", "cancelled": "yellow"},
}


INDENT = "  "
"""Before the lines on which a row of a table goes on."""

SHOWN = ("reward", "accuracy")
"""Figures of training that have room in a list."""


class Output(StrEnum):
    """How to print."""

    TEXT = "text"
    JSON = "json"


def out() -> Console:
    """Standard output, for results."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """Standard error, for progress and complaints."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def escape_what_cannot_be_shown() -> None:
    """Characters that standard output has no bytes for come out as `\\xfc`, not as an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Pure JSON on standard output, whatever the terminal."""
    unicode = sys.stdout.encoding.lower() in ("utf-8", "utf8")
    written = json.dumps(_jsonable(value), indent=indent, ensure_ascii=not unicode)
    # those that JSON does not write as escapes by itself
    print(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda c: f"\\u{ord(c.group()):04x}", written))


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Metrics):
        return value.as_dict()
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def line(text: str) -> None:
    """A line of a result."""
    print(plain(text))


def note(text: str) -> None:
    """A line for people beside a result, on standard error."""
    err().print(escape(text))


def mistakes(found: Iterable[tuple[str, str]]) -> None:
    """A line for each field at fault; a sentence that begins with the field's name loses it."""
    for param, message in found:
        sentence = message.removeprefix(f"{param}: ")
        err().print(f"  [bold]{escape(param)}[/]  {escape(sentence)}")


def complain(message: str, *, lines: bool = False) -> None:
    """What went wrong; `lines` where it is told in several, with the end of a log, say."""
    err().print("[red]bridge:[/] " + markup.escape(plain(message, lines=lines)))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, wrapping: Sequence[str] = ()
) -> None:
    """A plain table; cells may hold rich markup. Nothing is cut: on a terminal too narrow for a
    row it goes on below, indented, or within its `wrapping` columns, which hold long texts."""
    console = out()
    cells = [[Text.from_markup(plain(cell)) for cell in row] for row in rows]
    if wrapping and console.is_terminal:
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            grid.add_column(column, no_wrap=column not in wrapping, overflow="fold")
        for row in cells:
            grid.add_row(*row)
        console.print(grid, soft_wrap=False)
        return
    cells.insert(0, [Text(column, style="bold") for column in columns])
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    lines = _lines(widths, console.width if console.is_terminal else None)
    for row in cells:
        for places in lines:
            shown = Text("" if places[0] == 0 else INDENT)
            for place in places:
                shown.append_text(row[place])
                shown.pad_right(widths[place] - row[place].cell_len + len(GAP))
            shown.rstrip()
            if shown or places[0] == 0:
                console.print(shown)


def _lines(widths: Sequence[int], room: int | None) -> list[list[int]]:
    """Which columns stand on which line of a row: as many on each as there is room for."""
    lines: list[list[int]] = []
    used = 0
    for place, width in enumerate(widths):
        if not lines or (room is not None and used + len(GAP) + width > room):
            lines.append([place])
            used = width + (len(INDENT) if place else 0)
        else:
            lines[-1].append(place)
            used += len(GAP) + width
    return lines


def status_cell(status: str) -> str:
    style = STYLES.get(status)
    return f"[{style}]{status}[/]" if style else escape(status)


def job_row(job: Job) -> list[str]:
    latest = {
        key: value
        for key, value in job.latest.items()
        if value is not None and (key in SHOWN or job.kind == "eval")
    }
    return [
        escape(job.id),
        status_cell(job.status),
        escape(job.method or ""),
        escape(job.model or ""),
        f"{job.step}/{job.steps}",
        escape(figures(latest)),
        when(job.created_at),
        escape(job.name or ""),
    ]


def when(time: str | None) -> str:
    """`2026-01-31 12:30:00` of an ISO 8601 text."""
    return escape((time or "")[:19].replace("T", " "))


def show_job(job: Job) -> None:
    """One job in full, for a person."""
    console = out()
    title = f" {escape(job.name)}" if job.name else ""
    console.print(f"[bold]{escape(job.id)}[/]{title}  {status_cell(job.status)}")
    of = job.spec.get("adapter") or job.model or "?"
    what = "problem" if job.kind == "eval" else "step"
    console.print(f"  {escape(f'{job.method} on {of}')}, {what} {job.step} of {job.steps}")
    if job.waiting_for:
        console.print(f"  waits for {escape(job.waiting_for)}")
    if job.priority:
        console.print(f"  priority {job.priority}")
    if job.forked_from:
        step = job.forked_from.get("step")
        source = f"{job.forked_from.get('job')}" + (f" at {step}" if step else "")
        console.print(f"  forked from {escape(source)}")
    for label, time in (
        ("created", job.created_at),
        ("started", job.started_at),
        ("finished", job.finished_at),
    ):
        if time:
            console.print(f"  {label} {when(time)}")
    latest = {key: value for key, value in job.latest.items() if value is not None}
    if latest:
        console.print(f"  {escape(figures(latest))}")
    show_end(job, console)


def show_end(job: Job, console: Console) -> None:
    """How a job ended: its accuracy before and after, or its error; nothing while it runs."""
    if job.error:
        where = f" [{job.error['param']}]" if job.error.get("param") else ""
        sentence = f"{job.error.get('message')}{where} ({job.error.get('code')})"
        console.print(f"  [red]error:[/] {escape(sentence)}")
    if job.result and _measured(job.result):
        console.print(f"  held-out accuracy {escape(before_after(job.result))}")
    if job.adapter:
        console.print(f"  adapter {escape(job.adapter)}")


def _measured(result: dict[str, Any]) -> bool:
    """Did a training job have data to measure accuracy on?"""
    return any(result.get(f"accuracy_{end}") is not None for end in ("before", "after"))


def before_after(result: dict[str, Any]) -> str:
    """`17.2 % (95 %: 13.0 to 22.4) → 68.8 % (95 %: 62.8 to 74.2)`."""
    before, after = (
        percent(result.get(f"accuracy_{end}")) + bounds(result.get(f"accuracy_{end}_ci"))
        for end in ("before", "after")
    )
    return f"{before} → {after}"


def show_adapters(adapters: Sequence[Adapter]) -> None:
    columns = ["NAME", "STATUS", "BASE MODEL", "RANK", "ACCURACY", "CREATED"]
    rows = [
        [
            escape(a.name),
            escape(a.status or ""),
            escape(a.base_model or ""),
            str(a.rank or ""),
            "" if a.accuracy is None else percent(a.accuracy),
            when(a.created_at),
        ]
        for a in adapters
    ]
    table(columns, rows)


def show_metrics(metrics: Metrics) -> None:
    """One row a metric: how it began, its range, how it stands."""
    rows = []
    for key, series in sorted(metrics.items()):
        values = [value for value in series.values if value is not None]
        if values:
            shown = (values[0], min(values), max(values), values[-1])
            rows.append([escape(key), str(len(series)), *(f"{value:.4g}" for value in shown)])
    table(["METRIC", "POINTS", "FIRST", "MIN", "MAX", "LAST"], rows)


def show_generation(generation: Generation) -> None:
    """The answers alone, so that they can be piped."""
    for choice in generation.choices:
        print(plain(choice.text, lines=True))
