"""A run's events on their way into the tables, exactly once.

An event is known by (job, seq): forwarding a batch again changes nothing. What the events say is
written to the tables in the same transaction that stores them, so the two never disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from bridge_engine import events as ev
from service.store import rollups
from service.store.adapters import STUDENT
from service.store.artifacts import Artifact, keep_artifacts
from service.store.database import Database, JsonText, clean, insert_rows, upsert
from service.store.errors import NotFound
from service.store.leases import owned
from service.store.models import (
    AdapterRow,
    ArtifactRow,
    CheckpointRow,
    EventRow,
    JobRow,
    MetricRow,
    SampleRow,
)
from service.store.status import TERMINAL


class Stream(Database):
    """The part of the store that takes events in and gives them out again."""

    def append_events(
        self,
        job_id: str,
        attempt: int,
        events: Sequence[ev.Event],
        artifacts: Sequence[Artifact] = (),
    ) -> int:
        """Stores events that are not stored yet; returns how many were new.

        `artifacts` are what the last of them, a checkpoint, has left in the artifact store: the
        rows that name them appear with it. Raises StaleAttempt if this attempt does not own the
        job.
        """
        if not events:
            return 0
        with self.write() as session:
            job = owned(session, job_id, attempt)
            known = _known(session, job_id, events)
            fresh = {event.seq: event for event in events if event.seq not in known}
            if fresh:
                _Projection(session, job).apply([fresh[seq] for seq in sorted(fresh)])
            keep_artifacts(session, job_id, artifacts)
            return len(fresh)

    def last_seq(self, job_id: str) -> int:
        """The greatest seq stored of this job; 0 if none."""
        with self.read() as session:
            query = select(func.max(EventRow.seq)).where(EventRow.job_id == job_id)
            return session.scalar(query) or 0

    def ended_as(self, job_id: str) -> str | None:
        """The job's status if it has ended, else None; raises NotFound."""
        with self.read() as session:
            status = session.scalar(select(JobRow.status).where(JobRow.id == job_id))
        if status is None:
            raise NotFound("job", job_id)
        return status if status in TERMINAL else None

    def events_after(self, job_id: str, seq: int = 0, limit: int = 500) -> list[EventRow]:
        """Events that came after `seq`, in order."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > seq)
        with self.read() as session:
            return list(session.scalars(query.order_by(EventRow.seq).limit(limit)))


def _known(session: Session, job_id: str, events: Iterable[ev.Event]) -> set[int]:
    seqs = [event.seq for event in events]
    query = select(EventRow.seq).where(
        EventRow.job_id == job_id, EventRow.seq.between(min(seqs), max(seqs))
    )
    return set(session.scalars(query))


class _Projection:
    """Turns a batch of events into rows. Rows are gathered and written at once; a `resume` in the
    middle of a batch first writes what came before it."""

    def __init__(self, session: Session, job: JobRow) -> None:
        self._session = session
        self._job = job
        self._metrics: dict[tuple[str, int], float | None] = {}
        self._latest: dict[str, float | None] = {}
        self._reached = job.progress_step
        self._samples: list[tuple[Any, ...]] = []

    def apply(self, events: Sequence[ev.Event]) -> None:
        for event in events:
            match event:
                case ev.Metric():
                    self._metric(event)
                case ev.Sample():
                    self._sample(event)
                case ev.Checkpoint():
                    self._checkpoint(event)
                case ev.Resume():
                    self._resume(event)
                case ev.Phase(steps=int(steps)):
                    self._job.total_steps = steps
                case _:
                    pass  # a phase, a log line, an end: the event itself is all there is to keep
        self._write_gathered()
        job_id, attempt = self._job.id, self._job.attempt
        rows = (
            (
                *(job_id, event.seq, attempt, getattr(event, "step", None), event.type),
                *(_as_json(event), datetime.fromtimestamp(event.time, UTC)),
            )
            for event in events
        )
        columns = ("job_id", "seq", "attempt", "step", "type", "data", "time")
        insert_rows(self._session, EventRow, columns, rows)

    def _metric(self, event: ev.Metric) -> None:
        step = event.step
        figures = {clean(key): clean(value) for key, value in event.metrics.items()}
        self._metrics.update({(key, step): value for key, value in figures.items()})
        self._latest.update(figures)
        self._reached = max(self._reached, event.step)

    def _sample(self, event: ev.Sample) -> None:
        fields = clean(event.model_dump(include=set(_SAMPLE_FIELDS)))
        self._samples.append((self._job.id, *(fields[name] for name in _SAMPLE_FIELDS)))

    def _checkpoint(self, event: ev.Checkpoint) -> None:
        job, now = self._job, datetime.now(UTC)
        if job.checkpoint_step is None or event.step > job.checkpoint_step:
            job.lost_attempts = 0  # it gets somewhere, however often it breaks down
            job.checkpoint_step = event.step
        common = {"job_id": job.id, "step": event.step, "created_at": now}
        checkpoint = {
            **common,
            "path": event.path,
            "adapter": event.adapter or "",
            "sha256": event.sha256 or "",
            "rank": event.rank or 0,
            "accuracy": clean(event.accuracy),
            "best": False,
        }
        upsert(self._session, CheckpointRow, [checkpoint])
        adapter = {
            **common,
            "base_model": job.model,
            "template": event.template or job.spec.get("template", {}),
            "status": "registered",
            "error": None,
        }
        name = f"{job.id}@{event.step}"
        policy = {
            **adapter,
            "name": name,
            "path": event.adapter,
            "sha256": event.sha256,
            "rank": event.rank,
            "accuracy": clean(event.accuracy),
        }
        student = {
            **adapter,
            "name": name + STUDENT,
            "path": event.student,
            "sha256": event.student_sha256,
            "rank": event.student_rank,
            "accuracy": clean(event.student_accuracy),
        }
        if event.adapter is None:  # a full student: the whole model answers in its place
            policy |= {"path": event.merged, "sha256": event.merged_sha256, "rank": 0}
            whole = {"path": event.merged_student, "sha256": event.merged_student_sha256}
            student |= {**whole, "rank": 0}
        rows = [row for row in (policy, student) if row["path"] and row["sha256"]]
        upsert(self._session, AdapterRow, rows)
        self._find_best()

    def _resume(self, event: ev.Resume) -> None:
        """Whatever was reported for later steps is void: it will be computed again."""
        self._write_gathered()
        job, session = self._job, self._session
        for table in (SampleRow, CheckpointRow, AdapterRow, ArtifactRow):
            later = (table.job_id == job.id) & (table.step > event.step)
            session.execute(delete(table).where(later))
        # Key by key: by the step alone, every figure of the job would be looked at.
        figures = (MetricRow.job_id == job.id) & MetricRow.key.in_(list(job.latest))
        session.execute(delete(MetricRow).where(figures, MetricRow.step > event.step))
        rollups.void(session, job, event.step + 1)
        newest = select(func.max(CheckpointRow.step)).where(CheckpointRow.job_id == job.id)
        job.checkpoint_step = session.scalar(newest)
        # a step of -1: not even the first measurement stands
        job.progress_step = self._reached = max(event.step, 0)
        job.latest = self._last_values()
        self._find_best()

    def _last_values(self) -> dict[str, float | None]:
        values = {}
        for key in self._job.latest:
            of_key = (MetricRow.job_id == self._job.id) & (MetricRow.key == key)
            query = select(MetricRow.value).where(of_key).order_by(MetricRow.step.desc()).limit(1)
            if (last := self._session.execute(query).one_or_none()) is not None:
                values[key] = last.value
        return values

    def _find_best(self) -> None:
        """The best checkpoint is the one with the highest accuracy, of equals the latest."""
        job, session = self._job, self._session
        measured = select(CheckpointRow.step).where(
            CheckpointRow.job_id == job.id, CheckpointRow.accuracy.is_not(None)
        )
        order = (CheckpointRow.accuracy.desc(), CheckpointRow.step.desc())
        job.best_step = session.scalar(measured.order_by(*order).limit(1))
        # Of all of them, only the rows that change are written.
        best = CheckpointRow.step == (-1 if job.best_step is None else job.best_step)
        flag = update(CheckpointRow).where(CheckpointRow.job_id == job.id)
        session.execute(flag.where(CheckpointRow.best != best).values(best=best))

    def _write_gathered(self) -> None:
        session, job = self._session, self._job
        job_id, known = job.id, job.progress_step
        points = self._metrics.items()
        # Of a step that is reported on for the first time nothing can be there already.
        new = [(job_id, key, step, value) for (key, step), value in points if step > known]
        insert_rows(session, MetricRow, _FIGURE, new)
        again = [(job_id, key, step, value) for (key, step), value in points if step <= known]
        upsert(session, MetricRow, [dict(zip(_FIGURE, row, strict=True)) for row in again])
        rollups.roll_up(session, job, self._metrics, self._reached)
        job.progress_step = self._reached
        if self._latest:
            job.latest = {**job.latest, **self._latest}
        insert_rows(session, SampleRow, ("job_id", *_SAMPLE_FIELDS), self._samples)
        self._metrics, self._latest, self._samples = {}, {}, []


def _as_json(event: ev.Event) -> object:
    """The event as its column takes it. Metrics, of which there are many, come as pydantic writes
    them, which knows no NaN; a NUL in a text is seen in it as well."""
    if isinstance(event, ev.Metric) and "\\u0000" not in (written := event.model_dump_json()):
        return JsonText(written)
    return clean(event.model_dump(mode="json"))


_FIGURE = ("job_id", "key", "step", "value")
_SAMPLE_FIELDS = ("step", "source", "problem", "completion", "gold", "reward")
