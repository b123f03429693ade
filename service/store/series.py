"""What a run has shown so far: metric series, samples, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store.database import Database
from service.store.errors import NotFound
from service.store.jobs import found
from service.store.models import CheckpointRow, JobRow, MetricRow, SampleRow
from service.store.thinning import Point, Thinned


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

        With `max_points` (at least 4) a longer series is thinned out: its steps are cut into equal
        sections, of each of which the smallest and the greatest point remain, and the first and the
        last one of all. What stuck out still sticks out. What it costs depends on what is asked
        for, not on how long the series is.
        """
        if max_points is not None and max_points < 4:
            raise ValueError(f"max_points must be at least 4, not {max_points}")
        with self.read() as session:
            job = _progress(session, job_id)
            names = sorted(job.latest if keys is None else set(keys) & set(job.latest))
            start = 0 if after_step is None else after_step + 1
            if max_points is None:
                return _points(session, job_id, names, start)
            return Thinned(session, job_id, job.rolled_steps, start, max_points).series(names)

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
                query = query.where(SampleRow.step <= last.step)  # where the index is entered
            return list(session.scalars(query))

    def checkpoints(self, job_id: str) -> list[CheckpointRow]:
        """The job's checkpoints by rising step; raises NotFound."""
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        with self.read() as session:
            found(session, job_id)
            return list(session.scalars(query.order_by(CheckpointRow.step)))


def _progress(session: Session, job_id: str) -> Any:
    """What there is of the job's series; not the whole of its row."""
    query = select(JobRow.latest, JobRow.rolled_steps).where(JobRow.id == job_id)
    if (job := session.execute(query).one_or_none()) is None:
        raise NotFound("job", job_id)
    return job


def _points(
    session: Session, job_id: str, names: Sequence[str], start: int
) -> dict[str, list[Point]]:
    """Every point from step `start` on."""
    query = select(MetricRow.key, MetricRow.step, MetricRow.value).where(
        MetricRow.job_id == job_id, MetricRow.key.in_(names), MetricRow.step >= start
    )
    series: dict[str, list[Point]] = {}
    for key, step, value in session.execute(query.order_by(MetricRow.key, MetricRow.step)):
        series.setdefault(key, []).append((step, value))
    return series
