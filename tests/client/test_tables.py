"""What is printed keeps its ids, states and numbers whole however narrow the terminal is."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from bridge_client import evaluations, methods, output
from bridge_client.models import Adapter, Event, Job, Scores
from bridge_client.watch import Watch

JOBS = [
    Job.model_validate(
        {
            **{"id": f"job_1k16crg9v3xq7m{i}c8p2n4a6s0d", "status": status, "method": "cold_start"},
            **{"model": "smollm2-135m-instruct", "step": 1200, "steps": 1200},
            **{"latest": {"reward": 0.41, "accuracy": 0.45}},
            **{"created_at": "2026-11-26T19:59:09Z", "name": f"the name of job {i}"},
        }
    )
    for i, status in enumerate(("succeeded", "cancelling"))
]


@pytest.fixture(params=[60, 80, 200, None], ids=lambda width: f"{width or 'piped'}")
def console(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of this width, or a pipe."""
    width = request.param
    console = Console(
        file=io.StringIO(),
        force_terminal=width is not None,
        width=width,
        no_color=True,
        highlight=False,
        soft_wrap=True,
        legacy_windows=False,
    )
    monkeypatch.setattr(output, "out", lambda: console)
    return console


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())


def test_a_list_keeps_every_cell_whole_and_within_the_width(console: Console) -> None:
    columns = ["JOB", "STATUS", "METHOD", "MODEL", "STEP", "LATEST", "CREATED", "NAME"]
    output.table(columns, [output.job_row(job) for job in JOBS])
    text = printed(console)
    for cell in columns + [cell for job in JOBS for cell in output.job_row(job)]:
        assert re.sub(r"\[.*?\]", "", cell) in text
    lines = text.splitlines()
    if console.is_terminal:
        assert max(map(len, lines)) <= console.width
    if not console.is_terminal or console.width == 200:
        assert len(lines) == 3
    assert all(line == line.rstrip() for line in lines)


def test_a_cell_wider_than_the_terminal_is_whole_too(console: Console) -> None:
    output.table(["ID", "NAME", "N"], [["x", "long " * 60, "7"], ["y", "", "8"]])
    text = printed(console)
    assert ("long " * 60).strip() in text
    for number in ("7", "8"):
        assert re.search(rf"\b{number}$", text, re.M)


def test_adapters_and_comparisons_are_whole_at_any_width(console: Console) -> None:
    adapter = {
        **{"name": "job_1k16crg9v3xq7m0c8p2n4a6s0d@1200", "base_model": "smollm2-135m-instruct"},
        **{"status": "registered", "rank": 16, "accuracy": 0.683},
    }
    output.show_adapters([Adapter.model_validate(adapter)])
    one = {"ours": 0.6875, "theirs": 0.1719, "difference": 0.5156, "low": 0.45, "high": 0.58}
    one |= {"problems": 1319, "better": 700, "worse": 20}
    against = {"job_id": "job_2", "model": "m", "benchmarks": {"arithmetic": one}}
    evaluations.compare(Scores.model_validate({"job_id": "job_1", "against": against}))
    text = printed(console)
    for cell in (*map(str, adapter.values()), "68.8 %", "+51.6", "+45.0 to +58.0", "700 / 20"):
        assert cell.replace("0.683", "68.3 %") in text


def test_the_options_of_the_methods_wrap(console: Console) -> None:
    methods.show()
    text = printed(console)
    assert "cold_start" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_of_a_watched_job_shows_its_step_and_its_time_whole(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)
    figures: dict[str, Any] = {"reward": 0.41, "accuracy": 0.45, "gain": 0.012, "sft/nll": 0.334}
    with Watch(JOBS[0], console) as watch:
        watch.see(Event(seq=1, type="phase", phase="evaluating"))  # type: ignore[call-arg]
        watch.see(Event(seq=2, type="metric", step=1200, metrics=figures))  # type: ignore[call-arg]
    text = printed(console)
    assert "…" not in text
    last = [line for line in re.split(r"[\r\n]", text) if "1200/1200" in line][-1]
    assert re.search(r"1200/1200 .*reward 0\.41 .*\d:\d\d:\d\d", last)
    if width == 120:
        assert "sft/nll 0.33" in last
