"""Long series, thinned out for a chart: from rollups where there are any, else from the points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import literal, select, union_all
from sqlalchemy.orm import Session

from service.store.models import MetricRow, RollupRow
from service.store.rollups import FINEST, LEVELS, cover

Point = tuple[int, float | None]
"""(step, value); a value that was not a number is None."""


@dataclass
class Extent:
    """How far a series goes, and how many points it has."""

    count: int
    first: Point
    last: Point


@dataclass
class Thinned:
    """The series of a job from step `start` on, at most `max_points` (4 or more) of each."""

    session: Session
    job_id: str
    rolled: int
    """`JobRow.rolled_steps`, as the session sees it."""
    start: int
    max_points: int

    def series(self, keys: Sequence[str]) -> dict[str, list[Point]]:
        """Each metric's points, by rising step; metrics without any are left out."""
        extents = self._extents(keys)
        by_width: dict[int, list[str]] = defaultdict(list)
        for key, extent in extents.items():
            by_width[self._width(extent)].append(key)
        points: dict[str, dict[int, float | None]] = {}
        for width, alike in by_width.items():
            points.update(self._sections(alike, width))
        for key, extent in extents.items():
            points[key].update([extent.first, extent.last])
        return {key: sorted(points[key].items()) for key in keys if key in points}

    def _width(self, extent: Extent) -> int:
        """Steps a section has, so that two points of each and both ends are not too many: a power
        of two, so that it is made of whole buckets. 1 where every point is wanted."""
        if extent.count <= self.max_points:
            return 1
        width, sections = FINEST, (self.max_points - 2) // 2
        while extent.last[0] // width - extent.first[0] // width + 1 > sections:
            width *= 2
        return width

    def _extents(self, keys: Sequence[str]) -> dict[str, Extent]:
        point = (literal(1), *(MetricRow.step, MetricRow.value) * 2)
        names = ("points", "first_step", "first", "last_step", "last")
        rows = self._read(keys, LEVELS[-1], point, names)
        extents: dict[str, Extent] = {}
        for key, count, first_step, first, last_step, last in rows:
            known = extents.setdefault(key, Extent(0, (first_step, first), (last_step, last)))
            known.count += count
            if first_step < known.first[0]:
                known.first = (first_step, first)
            if last_step > known.last[0]:
                known.last = (last_step, last)
        return extents

    def _sections(self, keys: Sequence[str], width: int) -> dict[str, dict[int, float | None]]:
        """The smallest and the greatest point of every section of so many steps; of equals the
        first. Where none is a number, the first that is none."""
        point = (MetricRow.step, MetricRow.value) * 2
        names = ("low_step", "low", "high_step", "high")
        lows: dict[tuple[str, int], Rank] = {}
        highs: dict[tuple[str, int], Rank] = {}
        for key, low_step, low, high_step, high in self._read(keys, width, point, names):
            section = (key, low_step // width)
            lowest, highest = _rank(low_step, low, 1), _rank(high_step, high, -1)
            lows[section] = min(lows.get(section, lowest), lowest)
            highs[section] = min(highs.get(section, highest), highest)
        found: dict[str, dict[int, float | None]] = defaultdict(dict)
        for sign, extremes in ((1, lows), (-1, highs)):
            for (key, _), (unknown, value, step) in extremes.items():
                found[key][step] = None if unknown else sign * value
        return found

    def _read(
        self, keys: Sequence[str], coarsest: int, point: Iterable[Any], names: Iterable[str]
    ) -> Iterable[Any]:
        """Rows (key, …) of buckets of at most `coarsest` steps: the columns `names` of rollups, and
        `point` where single points are read."""
        selects = []
        fields = [getattr(RollupRow, name) for name in names]
        columns = [field.label(field.name) for field in fields]
        labelled = [column.label(name.name) for column, name in zip(point, fields, strict=True)]
        for level, start, stop in cover(self.start, self.rolled, coarsest):
            if level == 1:
                query = select(MetricRow.key, *labelled).where(
                    MetricRow.job_id == self.job_id,
                    MetricRow.key.in_(keys),
                    MetricRow.step >= start,
                )
                selects.append(query if stop is None else query.where(MetricRow.step < stop))
                continue
            assert stop is not None
            selects.append(
                select(RollupRow.key, *columns).where(
                    RollupRow.job_id == self.job_id,
                    RollupRow.key.in_(keys),
                    RollupRow.level == level,
                    RollupRow.bucket >= start // level,
                    RollupRow.bucket < stop // level,
                )
            )
        return self.session.execute(union_all(*selects))


Rank = tuple[bool, float, int]


def _rank(step: int, value: float | None, sign: int) -> Rank:
    """Less for what sticks out further (up, if `sign` is -1), then for what came first; what is not
    a number comes last."""
    return (True, 0.0, step) if value is None else (False, sign * value, step)
