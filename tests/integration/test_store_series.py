"""Charts of long series: thinned out by the database, they are what plain Python makes of the
points, on SQLite and on Postgres."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from bridge_engine import events as ev
from service.store import Store
from service.store.models import RollupRow
from service.store.rollups import LEVELS
from service.store.thinning import Thinned
from tests.support.jobs import metric, numbered, run_to

Series = dict[str, dict[int, float | None]]

KEYS = ("reward", "kl", "eval/accuracy")
values = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-1e9, 1e9), st.none(), st.just(float("nan"))
)
runs = st.tuples(
    st.just("run"),
    st.integers(1, 60),  # so many steps
    st.sampled_from([1, 1, 1, 3, 70, 900]),  # so far apart
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True),
    st.lists(values, min_size=1, max_size=20),
)
resumes = st.tuples(st.just("resume"), st.floats(0, 1.1))
again = st.tuples(st.just("again"), st.floats(0, 1), values)
histories = st.lists(st.one_of(runs, runs, resumes, again), min_size=1, max_size=5)


def told(history: list[Any], series: Series) -> Iterator[ev.Event]:
    """The events of a history, and in `series` what plain Python makes of them."""
    step = -1
    for kind, *what in history:
        if kind == "run":
            length, stride, keys, figures = what
            for value in itertools.islice(itertools.cycle(figures), length):
                step += stride
                for key in keys:
                    series[key][step] = value if value is not None and value == value else None
                yield metric(step, **dict.fromkeys(keys, value))
        elif kind == "resume":
            step = max(math.floor(what[0] * step), -1)
            for points in series.values():
                for later in [s for s in points if s > step]:
                    del points[later]
            yield ev.Resume(step=step)
        else:  # a figure of an old step comes late, or comes again
            at, value = max(math.floor(what[0] * step), 0), what[1]
            series["reward"][at] = value if value is not None and value == value else None
            step = max(step, at)
            yield metric(at, reward=value)


def thinned(points: Mapping[int, float | None], limit: int) -> dict[int, float | None]:
    """Plain Python's word for what remains."""
    steps = sorted(points)
    if len(steps) <= limit:
        return dict(points)
    width = 8
    while steps[-1] // width - steps[0] // width + 1 > (limit - 2) // 2:
        width *= 2
    kept = {steps[0], steps[-1]}
    for _, section in itertools.groupby(steps, key=lambda step: step // width):
        there = list(section)
        numbers = [s for s in there if points[s] is not None] or there[:1]
        kept |= {min(numbers, key=points.get), max(numbers, key=points.get)}  # type: ignore[arg-type]
    return {step: points[step] for step in kept}


@settings(
    max_examples=12,  # hundreds of transactions each
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    history=histories,
    batch=st.sampled_from([1, 7, 30, 100]),
    limit=st.integers(4, 90),
    after=st.floats(-0.1, 1.1),
    data=st.data(),
)
def test_a_thinned_series_is_what_plain_python_makes_of_its_points(
    store: Store, history: list[Any], batch: int, limit: int, after: float, data: st.DataObject
) -> None:
    """Whatever the gaps, the figures that are not numbers, the resumes and the late comers."""
    job_id = run_to(store, "running")
    series: Series = defaultdict(dict)
    events = numbered(*told(history, series))
    for start in range(0, len(events), batch):
        store.append_events(job_id, 1, events[start : start + batch])
    whole = {key: sorted(points.items()) for key, points in series.items() if points}
    assert store.metrics(job_id) == whole
    check_rollups(store, job_id, series)
    last = max((step for points in series.values() for step in points), default=0)
    after_step = data.draw(st.sampled_from([None, math.floor(after * last)]))
    got = store.metrics(job_id, after_step=after_step, max_points=limit)
    for key, points in series.items():
        rest = {s: v for s, v in points.items() if after_step is None or s > after_step}
        assert got.pop(key, []) == sorted(thinned(rest, limit).items())
        assert len(thinned(rest, limit)) <= limit
    assert not got


def check_rollups(store: Store, job_id: str, series: Series) -> None:
    """Every closed bucket that has points has a row, that row says what they come to, and there is
    no other one."""
    rolled = store.get_job(job_id).rolled_steps
    expected = {}
    for (key, points), level in itertools.product(series.items(), LEVELS):
        closed = (step for step in sorted(points) if (step // level + 1) * level <= rolled)
        for bucket, steps in itertools.groupby(closed, key=lambda step: step // level):
            there = list(steps)
            numbers = [s for s in there if points[s] is not None] or there[:1]
            low, high = min(numbers, key=points.get), max(numbers, key=points.get)  # type: ignore[arg-type]
            expected[key, level, bucket] = (
                *(len(there), there[0], points[there[0]], there[-1], points[there[-1]]),
                *(low, points[low], high, points[high]),
            )
    with store.read() as session:
        rows = session.scalars(select(RollupRow).where(RollupRow.job_id == job_id)).all()
    assert {
        (row.key, row.level, row.bucket): (
            *(row.points, row.first_step, row.first, row.last_step, row.last),
            *(row.low_step, row.low, row.high_step, row.high),
        )
        for row in rows
    } == expected
    greatest = max((step for points in series.values() for step in points), default=0)
    assert rolled >= greatest // LEVELS[0] * LEVELS[0], "all that has closed is summed up"


@pytest.mark.parametrize("steps", [5, 40, 80])
def test_a_late_figure_of_a_new_name_is_summed_up_however_far_behind_it_is(
    store: Store, steps: int
) -> None:
    job_id = run_to(store, "running")
    series: Series = defaultdict(dict)
    history = [("run", steps, 900, ["kl"], [0.0]), ("again", 0.0, 1.0)]
    history.append(("run", 1, 9, ["kl"], [1.0]))
    for event in numbered(*told(history, series)):
        store.append_events(job_id, 1, [event])
    assert series["reward"] == {0: 1.0}
    check_rollups(store, job_id, series)


def test_a_resume_takes_what_was_summed_up_of_void_steps_along(store: Store) -> None:
    job_id = run_to(store, "running")
    first = [metric(step, reward=100.0 + step) for step in range(300)]
    store.append_events(job_id, 1, numbered(*first))
    second = [metric(step, reward=float(-step)) for step in range(90, 310)]
    store.append_events(job_id, 1, numbered(ev.Resume(step=89), start=301))
    check_rollups(store, job_id, {"reward": {step: 100.0 + step for step in range(90)}})
    store.append_events(job_id, 1, numbered(*second, start=302))
    points = {step: 100.0 + step if step < 90 else float(-step) for step in range(310)}
    check_rollups(store, job_id, {"reward": dict(points)})
    got = store.metrics(job_id, max_points=20)["reward"]
    assert got == sorted(thinned(points, 20).items())


def test_a_resume_takes_them_along_though_the_next_figure_of_its_batch_is_far_ahead(
    store: Store,
) -> None:
    job_id = run_to(store, "running")
    store.append_events(job_id, 1, numbered(*(metric(s, reward=1.0 + s) for s in range(300))))
    ahead = numbered(ev.Resume(step=89), metric(200, reward=0.0), start=301)
    store.append_events(job_id, 1, ahead)
    points: dict[int, float | None] = {step: 1.0 + step for step in range(90)}
    check_rollups(store, job_id, {"reward": points | {200: 0.0}})


def test_jobs_from_before_there_were_rollups_are_thinned_alike(store: Store) -> None:
    """And are summed up with the next figures that come in."""
    job_id = run_to(store, "running")
    points = {step: math.sin(step) for step in range(1500)}
    store.append_events(job_id, 1, numbered(*(metric(s, reward=v) for s, v in points.items())))
    after = store.metrics(job_id, max_points=40)
    with store.write() as session:
        session.execute(text("DELETE FROM rollups"))
        session.execute(text("UPDATE jobs SET rolled_steps = 0"))
    assert store.metrics(job_id, max_points=40) == after
    points[1500] = 2.0
    store.append_events(job_id, 1, numbered(metric(1500, reward=2.0), start=1501))
    check_rollups(store, job_id, {"reward": dict(points)})


def test_a_chart_reads_no_more_of_a_long_series_than_of_a_short_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten times as many points: rows that the database hands out are what a chart costs."""
    read: dict[int, int] = defaultdict(int)
    look = Thinned._read

    def counted(self: Thinned, *arguments: Any) -> list[Any]:
        rows = list(look(self, *arguments))
        read[steps] += len(rows)
        return rows

    monkeypatch.setattr(Thinned, "_read", counted)
    for steps in (1600, 16_000):
        job_id = run_to(store, "running")
        figures = (metric(step, reward=float(step % 97), kl=0.0) for step in range(steps))
        store.append_events(job_id, 1, numbered(*figures))
        points = store.metrics(job_id, max_points=100)
        assert 50 < len(points["reward"]) <= 100
    assert read[16_000] < 2 * read[1600]
    assert read[16_000] < 2 * 2 * 4 * 50 + 200  # both keys, sections of up to 4 buckets, the ends
