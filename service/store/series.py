"""What a run has shown so far: metric series, samples, checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, or_, select

from service.store.database import Database
from service.store.errors import NotFound
from service.store.jobs import found
from service.store.models import CheckpointRow, MetricRow, SampleRow

Point = tuple[int, float | None]
"""(step, value); a value that was not a number is None."""


class Series(Database):
    """The part of the store that charts and tables read."""

    def metrics(
        self,
        job_id: str,
        keys: Sequence[str] | None = None,
        after_step: int | None = None,
        max_points: int | None = None,
    ) -> dict[str, list[Point]]:
        """Each metric's points, by rising step; raises NotFound.

        With `max_points` (at least 4) a longer series is thinned out: of each of its sections the
        smallest and the greatest point remain, and the first and the last one of all. What stuck
        out still sticks out.
        """
        if max_points is not None and max_points < 4:
            raise ValueError(f"max_points must be at least 4, not {max_points}")
        query: Any = select(MetricRow.key, MetricRow.step, MetricRow.value)
        query = query.where(MetricRow.job_id == job_id)
        if keys is not None:
            query = query.where(MetricRow.key.in_(keys))
        if after_step is not None:
            query = query.where(MetricRow.step > after_step)
        if max_points is not None:
            query = _thinned(query, max_points)
        with self.read() as session:
            found(session, job_id)
            series: dict[str, list[Point]] = defaultdict(list)
            for key, step, value in session.execute(query.order_by("key", "step")):
                series[key].append((step, value))
        return dict(series)

    def samples(
        self, job_id: str, step: int | None = None, limit: int = 100, after: int | None = None
    ) -> list[SampleRow]:
        """Completions, those of the latest step first; raises NotFound.

        `after` is the id of the last one of the page before; NotFound if the job has it not (any
        more: a resumed job forgets what it will do again).
        """
        query = select(SampleRow).where(SampleRow.job_id == job_id)
        if step is not None:
            query = query.where(SampleRow.step == step)
        query = query.order_by(SampleRow.step.desc(), SampleRow.id).limit(limit)
        with self.read() as session:
            found(session, job_id)
            if after is not None:
                last = session.get(SampleRow, after)
                if last is None or last.job_id != job_id:
                    raise NotFound("sample", str(after))
                same = (SampleRow.step == last.step) & (SampleRow.id > last.id)
                query = query.where((SampleRow.step < last.step) | same)
            return list(session.scalars(query))

    def checkpoints(self, job_id: str) -> list[CheckpointRow]:
        """The job's checkpoints by rising step; raises NotFound."""
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        with self.read() as session:
            found(session, job_id)
            return list(session.scalars(query.order_by(CheckpointRow.step)))


def _thinned(query: Any, max_points: int) -> Any:
    """At most `max_points` of each key: extremes of equal sections, and the two ends."""
    points = query.subquery()
    key, step = points.c.key, points.c.step
    sections = (max_points - 2) // 2
    cut = select(
        points,
        func.count().over(partition_by=key).label("total"),
        func.ntile(sections).over(partition_by=key, order_by=step).label("section"),
        func.row_number().over(partition_by=key, order_by=step).label("rank"),
    ).subquery()
    # Figures that are not numbers come last either way: SQLite and Postgres sort NULLs apart.
    section = (cut.c.key, cut.c.section)
    unknown = cut.c.value.is_(None)
    low = func.row_number().over(partition_by=section, order_by=(unknown, cut.c.value, cut.c.step))
    high = func.row_number().over(
        partition_by=section, order_by=(unknown, cut.c.value.desc(), cut.c.step)
    )
    ranked = select(cut, low.label("low"), high.label("high")).subquery()
    keep = or_(
        ranked.c.total <= max_points,
        ranked.c.low == 1,
        ranked.c.high == 1,
        ranked.c.rank == 1,
        ranked.c.rank == ranked.c.total,
    )
    return select(ranked.c.key.label("key"), ranked.c.step.label("step"), ranked.c.value).where(
        keep
    )
