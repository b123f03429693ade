"""Series in coarser and coarser steps: a chart of a million points reads a few thousand rows.

The points of a metric in a bucket of 8 steps are summed up in one row, eight of those in one row of
64 steps, and so on. A bucket is summed up when it closes: when the job has gone past its last step.
`JobRow.rolled_steps` says how far that is; what comes after it is read point by point. Points that
become void take the rollups they are in with them, in the same transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from sqlalchemy import and_, delete, or_, select
from sqlalchemy.orm import Session

from service.store.database import insert_rows
from service.store.models import JobRow, MetricRow, RollupRow

LEVELS = (8, 64, 512, 4096, 32768)
"""Steps a bucket has; each is the same multiple of the one before, so that a row sums up eight."""
FINEST = LEVELS[0]
SLICE = 4096
"""Steps summed up at once: what is held in memory of a job that was never summed up before."""


class Summary(NamedTuple):
    """What the points of a bucket come to; the fields are those of `RollupRow`."""

    points: int
    first_step: int
    first: float | None
    last_step: int
    last: float | None
    low_step: int
    low: float | None
    high_step: int
    high: float | None


class Segment(NamedTuple):
    """Steps from `start` to `stop` (excluded; None: the end), read in buckets of `level` steps; 1:
    point by point."""

    level: int
    start: int
    stop: int | None


def of_points(points: Sequence[tuple[int, float | None]]) -> Summary:
    """Sums up points, steps rising; a value that is not a number counts and is no extreme."""
    first, last = points[0], points[-1]
    numbers = [point for point in points if point[1] is not None] or [first]
    low, high = min(numbers, key=_value), max(numbers, key=_value)
    return Summary(len(points), *first, *last, *low, *high)


def of_summaries(parts: Sequence[Summary]) -> Summary:
    """Sums up what was summed up, steps rising."""
    first, last = parts[0], parts[-1]
    numbers = [part for part in parts if part.low is not None] or [first]
    low, high = min(numbers, key=_low), max(numbers, key=_high)
    return Summary(
        sum(part.points for part in parts),
        *(first.first_step, first.first, last.last_step, last.last),
        *(low.low_step, low.low, high.high_step, high.high),
    )


_value = itemgetter(1)
_low, _high = attrgetter("low"), attrgetter("high")


def cover(start: int, rolled: int, coarsest: int) -> Iterator[Segment]:
    """The steps from `start` on in the fewest pieces of at most `coarsest` steps: whole buckets
    below `rolled`, finer ones towards both ends, single points at the very ends."""
    levels = [level for level in LEVELS if level <= coarsest]
    yield from _cover(start, rolled, levels)
    yield Segment(1, max(start, rolled), None)


def _cover(start: int, stop: int, levels: Sequence[int]) -> Iterator[Segment]:
    if start >= stop:
        return
    if not levels:
        yield Segment(1, start, stop)
        return
    *finer, level = levels
    first, last = -(-start // level) * level, stop // level * level
    if first >= last:
        yield from _cover(start, stop, finer)
        return
    yield from _cover(start, first, finer)
    yield Segment(level, first, last)
    yield from _cover(last, stop, finer)


def roll_up(
    session: Session, job: JobRow, points: Mapping[tuple[str, int], float | None], reached: int
) -> None:
    """Sums up the buckets that close as the job comes from `job.progress_step` to step `reached`.

    `points` by (key, step) have just been written; `job.latest` names the keys written before.
    """
    late = min((step for _, step in points), default=reached)
    if late < job.rolled_steps:
        void(session, job, late)
    end = reached // FINEST * FINEST
    keys = {*job.latest, *(key for key, _ in points)}
    while job.rolled_steps < end:
        stop = end
        if job.progress_step - job.rolled_steps > SLICE:
            stop = min(end, job.rolled_steps + SLICE)
        figures = _written(session, job, min(stop, job.progress_step + 1))
        for (key, step), value in points.items():
            if job.rolled_steps <= step < stop:
                figures[key][step] = value
        _close(session, job, keys, figures, stop)


def void(session: Session, job: JobRow, step: int) -> None:
    """Forgets what was summed up of `step` and later ones."""
    if step >= job.rolled_steps:
        return
    job.rolled_steps = max(step, 0) // FINEST * FINEST
    later = [
        and_(RollupRow.level == level, RollupRow.bucket >= job.rolled_steps // level)
        for level in LEVELS
    ]
    of_job = (RollupRow.job_id == job.id) & RollupRow.key.in_(list(job.latest))
    session.execute(delete(RollupRow).where(of_job, or_(*later)))


def _written(session: Session, job: JobRow, stop: int) -> dict[str, dict[int, float | None]]:
    """The points that are not summed up yet, up to step `stop`, by key and step."""
    figures: dict[str, dict[int, float | None]] = defaultdict(dict)
    query = select(MetricRow.key, MetricRow.step, MetricRow.value).where(
        MetricRow.job_id == job.id,
        MetricRow.key.in_(list(job.latest)),
        MetricRow.step >= job.rolled_steps,
        MetricRow.step < stop,
    )
    if job.rolled_steps < stop:
        for key, step, value in session.execute(query):
            figures[key][step] = value
    return figures


def _close(
    session: Session,
    job: JobRow,
    keys: Collection[str],
    figures: Mapping[str, Mapping[int, float | None]],
    stop: int,
) -> None:
    """Writes the rows of all buckets, of every level, that have not closed yet and end by `stop`;
    `figures` are all points of them, `keys` all names that the job's points have."""
    start, job.rolled_steps = job.rolled_steps, stop
    closed: dict[str, dict[int, Summary]] = {}
    rows: list[tuple[Any, ...]] = []
    for key, values in figures.items():
        buckets = defaultdict(list)
        for point in sorted(values.items()):
            buckets[point[0] // FINEST].append(point)
        closed[key] = {bucket: of_points(points) for bucket, points in buckets.items()}
        rows += _rows(job.id, key, FINEST, closed[key])
    for finer, level in pairwise(LEVELS):
        first, end = start // level, stop // level
        if first == end:
            break
        ratio = level // finer
        parts = _summaries(session, job, keys, finer, first * ratio, start // finer)
        for key, summaries in closed.items():
            parts[key].update(summaries)
        closed = {}
        for key, summaries in parts.items():
            groups = defaultdict(list)
            for bucket, summary in sorted(summaries.items()):
                if bucket // ratio < end:
                    groups[bucket // ratio].append(summary)
            closed[key] = {bucket: of_summaries(parts) for bucket, parts in groups.items()}
            rows += _rows(job.id, key, level, closed[key])
    insert_rows(session, RollupRow, ("job_id", "key", "level", "bucket", *Summary._fields), rows)


def _summaries(
    session: Session, job: JobRow, keys: Collection[str], level: int, start: int, stop: int
) -> dict[str, dict[int, Summary]]:
    """Rows of a level that were written before, by key and bucket."""
    found: dict[str, dict[int, Summary]] = defaultdict(dict)
    if start == stop:
        return found
    fields = [getattr(RollupRow, name) for name in Summary._fields]
    query = select(RollupRow.key, RollupRow.bucket, *fields).where(
        RollupRow.job_id == job.id,
        RollupRow.key.in_(list(keys)),
        RollupRow.level == level,
        RollupRow.bucket >= start,
        RollupRow.bucket < stop,
    )
    for key, bucket, *summary in session.execute(query):
        found[key][bucket] = Summary(*summary)
    return found


def _rows(
    job_id: str, key: str, level: int, summaries: Mapping[int, Summary]
) -> Iterator[tuple[Any, ...]]:
    return ((job_id, key, level, bucket, *summary) for bucket, summary in summaries.items())
