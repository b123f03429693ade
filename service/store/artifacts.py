"""What lies in the artifact store, what of it may go, and jobs that are deleted with all they left.

A row is there only while what it names is whole: it is written after the upload, in the transaction
of the event that speaks of it, and dropped before the files are. What the store holds and no row
names is garbage as soon as no attempt can name it any more; `garbage` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.store.database import Database, epoch_now, upsert
from service.store.errors import Conflict, NotFound
from service.store.leases import owned
from service.store.models import (
    AdapterRow,
    ArtifactRow,
    CheckpointRow,
    EventRow,
    JobRow,
    MetricRow,
    RemainRow,
    SampleRow,
)
from service.store.outbox import forget_messages
from service.store.status import OWNED

STATES = "checkpoints/"
"""Where resumable states lie in a run directory; exports lie elsewhere."""
AT_ONCE = 10_000
"""Rows, roughly, that one transaction deletes: other writers wait for it."""


@dataclass(frozen=True)
class Artifact:
    """A folder of a run, published."""

    path: str
    """In the run directory."""
    step: int
    prefix: str
    """In the store."""
    sha256: str
    """Of its manifest."""
    bytes: int


@dataclass(frozen=True)
class Dropped:
    """Folders that nothing names any more."""

    paths: list[str]
    """In the run directory."""
    prefixes: list[str]
    """In the artifact store."""


def publication(job_id: str, path: str, attempt: int, sha256: str) -> str:
    """The prefix of a run's folder `path`, as this attempt publishes it."""
    return f"{job_id}/{path}/{attempt}-{sha256[:16]}"


def attempt_of(prefix: str) -> int | None:
    """The attempt that made a publication; None if the prefix is none."""
    number = prefix.rpartition("/")[2].partition("-")[0]
    return int(number) if number.isdecimal() else None


def keep_artifacts(session: Session, job_id: str, artifacts: Iterable[Artifact]) -> None:
    """Writes the rows that name them."""
    now = datetime.now(UTC)
    rows = [{"job_id": job_id, **asdict(one), "created_at": now} for one in artifacts]
    upsert(session, ArtifactRow, rows)


def named_now(session: Session, prefixes: Sequence[str]) -> None:
    """These are no remains: rows name them, or nothing lies there."""
    session.execute(delete(RemainRow).where(RemainRow.prefix.in_(prefixes)))


def _note(session: Session, prefix: str) -> None:
    session.execute(insert(RemainRow).values(prefix=prefix, noted_at=epoch_now()))


class Artifacts(Database):
    """The part of the store that knows what was published where."""

    def artifact(self, job_id: str, path: str) -> ArtifactRow | None:
        """What was published of this folder of the run; None if nothing was."""
        with self.read() as session:
            return session.get(ArtifactRow, (job_id, path))

    def states(self, job_id: str) -> list[ArtifactRow]:
        """The published resumable states, the newest first."""
        with self.read() as session:
            return list(session.scalars(_states(job_id)))

    def retain(self, job_id: str, attempt: int) -> Dropped:
        """Drops what the spec's `checkpoint.keep` and `keep_adapters` do not keep; whoever calls
        deletes the folders. Raises StaleAttempt if this attempt does not own the job."""
        with self.write() as session:
            job = owned(session, job_id, attempt)
            rules = job.spec.get("checkpoint", {})
            old = list(session.scalars(_states(job_id)))[rules.get("keep", 3) :]
            gone = [row for row in old if row.step != job.best_step]
            prefixes = [row.prefix for row in gone]
            for row in gone:
                session.delete(row)
            paths: list[str] = []
            if isinstance(newest := rules.get("keep_adapters", "all"), int):
                paths = _drop_adapters(session, job, newest)
                named = select(ArtifactRow).where(
                    ArtifactRow.job_id == job_id, ArtifactRow.path.in_(paths)
                )
                for row in session.scalars(named).all():
                    prefixes.append(row.prefix)
                    session.delete(row)
            return Dropped(paths, prefixes)

    def garbage(self, job_id: str, prefixes: Iterable[str]) -> set[str]:
        """Those of the prefixes, found in the store before, that no row names and none ever will:
        the attempt that made them is over."""
        with self.read() as session:
            job = session.get(JobRow, job_id)
            if job is None:
                return set()
            over = job.attempt - 1 if job.status in OWNED else job.attempt
            named = set(
                session.scalars(select(ArtifactRow.prefix).where(ArtifactRow.job_id == job_id))
            )
        loose = {prefix: attempt_of(prefix) for prefix in set(prefixes) - named}
        return {prefix for prefix, number in loose.items() if number is not None and number <= over}

    def jobs_to_sweep(self, since: datetime) -> list[str]:
        """Jobs that may have left garbage: a later attempt owns them, or they ended since then."""
        lost = JobRow.status.in_(OWNED) & (JobRow.attempt > 1)
        query = select(JobRow.id).where(lost | (JobRow.finished_at > since))
        with self.read() as session:
            return list(session.scalars(query.order_by(JobRow.id)))

    # ------------------------------------------------------------------ what no row names

    def expect_remains(self, prefix: str) -> None:
        """Something will come to lie under this prefix before a row names it. Unless `create_job`
        has named it by then, it is among the `remains` some time later."""
        with self.write() as session:
            _note(session, prefix)

    def remains(self, older_than_seconds: float) -> list[str]:
        """Prefixes noted so long ago under which nothing is named, nor will be."""
        old = RemainRow.noted_at < epoch_now() - older_than_seconds
        with self.read() as session:
            return list(session.scalars(select(RemainRow.prefix).where(old)))

    def swept(self, prefix: str) -> None:
        """Nothing lies under this prefix any more."""
        with self.write() as session:
            named_now(session, [prefix])

    # ------------------------------------------------------------------ deleting a job

    def mark_deleted(self, job_id: str) -> None:
        """From now on nobody sees the job and its adapters; `forget` removes what is left of them.

        Raises NotFound for a job that is gone altogether, Conflict (`job_not_ended`).
        """
        with self.write() as session:
            job = session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update())
            if job is None:
                raise NotFound("job", job_id)
            if not job.ended:
                raise Conflict(
                    f"job {job_id} is {job.status}: cancel it and wait for its end, then delete it",
                    code="job_not_ended",
                )
            job.deleted_at = job.deleted_at or datetime.now(UTC)
            job.idempotency_key = None  # its owner may want the same job again
            session.execute(delete(AdapterRow).where(AdapterRow.job_id == job_id))
            forget_messages(session, [job_id])

    def deleted_jobs(self) -> list[str]:
        """Jobs that were marked and are not forgotten yet."""
        with self.read() as session:
            query = select(JobRow.id).where(JobRow.deleted_at.is_not(None))
            return list(session.scalars(query.order_by(JobRow.id)))

    def forget(self, job_id: str, *, remains: bool = False) -> None:
        """Deletes the rows of a marked job, the long tables piece by piece, the job's own last.

        `remains`: an upload may be on its way that knows nothing of this; what is published of the
        job from now on is noted to be removed.
        """
        for column, job_of in (
            (EventRow.seq, EventRow.job_id),
            (SampleRow.step, SampleRow.job_id),
            (MetricRow.step, MetricRow.job_id),
        ):
            while self._delete_some(job_id, column, job_of):
                pass
        with self.write() as session:
            marked = JobRow.deleted_at.is_not(None)
            gone = delete(JobRow).where(JobRow.id == job_id, marked).returning(JobRow.id)
            if session.scalar(gone) is not None and remains:
                _note(session, job_id)

    def _delete_some(
        self,
        job_id: str,
        column: InstrumentedAttribute[int],
        job_of: InstrumentedAttribute[str],
    ) -> bool:
        """Deletes the rows with the lowest numbers; False once there are none."""
        table = column.class_
        with self.write() as session:
            lowest = session.scalar(select(func.min(column)).where(job_of == job_id))
            if lowest is None:
                return False
            # a step has some dozens of figures, and one event each
            several = AT_ONCE if table is EventRow else AT_ONCE // 50
            some = (job_of == job_id) & (column < lowest + several)
            session.execute(delete(table).where(some))
            return True


def _states(job_id: str) -> Select[ArtifactRow]:
    query = select(ArtifactRow).where(
        ArtifactRow.job_id == job_id, ArtifactRow.path.startswith(STATES)
    )
    return query.order_by(ArtifactRow.step.desc())


def _drop_adapters(session: Session, job: JobRow, newest: int) -> list[str]:
    """Takes the adapters out of the registry that are not kept; all the folders of their steps."""
    exported = (
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job.id, CheckpointRow.adapter != "")
        .order_by(CheckpointRow.step.desc())
    )
    kept = _referenced(job)
    paths: list[str] = []
    for row in session.scalars(exported).all()[newest:]:
        if row.step in kept:
            continue
        of_step = (AdapterRow.job_id == job.id) & (AdapterRow.step == row.step)
        paths += session.scalars(select(AdapterRow.path).where(of_step)).all()
        session.execute(delete(AdapterRow).where(of_step))
        session.execute(
            update(CheckpointRow)
            .where(CheckpointRow.job_id == job.id, CheckpointRow.step == row.step)
            .values(adapter="", sha256="")
        )
        folder = row.adapter.rpartition("/")[2]
        paths += [f"models/{folder}", f"models/{folder}-student"]
    return paths


def _referenced(job: JobRow) -> set[int | None]:
    """Steps whose adapters somebody asks for by another name than their own."""
    return {job.best_step, job.checkpoint_step}
