"""The tables. Each class is a table and, read and detached, the row that callers get.

Types are chosen so that SQLite and Postgres answer alike: timestamps are aware UTC datetimes, JSON
keeps the order of its keys, and paths are relative to the job's run directory.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.store.status import TERMINAL


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in, the same instant in UTC out, on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses a naive datetime: nobody knows which instant it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value} given to the store; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """SQLite gives the wall clock back without its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = JSON(none_as_null=True)
# SQLite numbers rows by itself only when the key's type is exactly INTEGER.
RowId = BigInteger().with_variant(Integer(), "sqlite")


class Row(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _job_key() -> Any:
    return mapped_column(String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


class JobRow(Row):
    """A job: what was asked for, where it stands, who works on it."""

    __tablename__ = "jobs"
    __table_args__ = (
        # One index a list: newest first, within a status or a method; and the workers' two looks.
        Index(None, "status", "id"),
        Index(None, "method", "id"),
        Index(None, "name", "id"),
        Index(None, "status", "lease_expires_at"),
    )

    id: Mapped[str] = mapped_column(String, primary_key=True)
    """`job_` and a sortable word: later jobs have greater ids."""
    kind: Mapped[str] = mapped_column(String)
    name: Mapped[str | None] = mapped_column(String)
    method: Mapped[str] = mapped_column(String)
    model: Mapped[str] = mapped_column(String)
    status: Mapped[str] = mapped_column(String)
    """See `service.store.status`."""
    wanted: Mapped[str] = mapped_column(String)
    """What its owner wants: `run` or `cancel`."""
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    """The resolved spec: every default filled in."""
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """{category, code, message, param, retryable} of a failed job."""
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """The engine's result of a succeeded job."""
    latest: Mapped[dict[str, Any]] = mapped_column(Json)
    """The last value of every metric."""

    attempt: Mapped[int]
    """Fencing token: rises with every claim. 0 before the first."""
    lost_attempts: Mapped[int]
    """Attempts that broke down since the last new checkpoint."""
    worker_id: Mapped[str | None] = mapped_column(String)
    lease_expires_at: Mapped[float | None] = mapped_column(Double)
    """Seconds since the epoch by the database's clock."""

    progress_step: Mapped[int]
    total_steps: Mapped[int]
    best_step: Mapped[int | None]
    """Step of the checkpoint with the highest held-out accuracy."""
    checkpoint_step: Mapped[int | None]
    """Step of the newest checkpoint."""

    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    idempotency_key: Mapped[str | None] = mapped_column(String, unique=True)
    idempotency_hash: Mapped[str | None] = mapped_column(String)

    @property
    def adapter(self) -> str | None:
        """Name of the adapter to use: the best measured one, else the newest, else None."""
        if not self._exports_adapters:
            return None
        step = self.best_step if self.best_step is not None else self.checkpoint_step
        return None if step is None else f"{self.id}@{step}"

    @property
    def _exports_adapters(self) -> bool:
        """A full student has an adapter only where the spec asks for one."""
        full = self.spec.get("student", {}).get("form") == "full"
        return not full or self.spec.get("export", {}).get("svd_rank") is not None

    @property
    def ended(self) -> bool:
        """Nothing about this job will change any more."""
        return self.status in TERMINAL


class OutboxRow(Row):
    """A message to be sent: "this job waits". Written in the transaction that queues the job,
    deleted by the claim that takes it."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "sent_at", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(
        String, ForeignKey("jobs.id", ondelete="CASCADE"), index=True
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    sent_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AttemptRow(Row):
    """One worker's try at a job."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = _job_key()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(String)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[str | None] = mapped_column(String)
    """`succeeded`, `failed`, `cancelled`, `released` (handed back) or `lost` (broke down, also
    while its job was being cancelled); None as it runs."""
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)


class EventRow(Row):
    """One event of a run, as the engine wrote it (`bridge_engine.events`)."""

    __tablename__ = "events"

    job_id: Mapped[str] = _job_key()
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int]
    step: Mapped[int | None]
    type: Mapped[str] = mapped_column(String)
    data: Mapped[dict[str, Any]] = mapped_column(Json)
    """The whole event, `seq`, `type` and `time` included."""
    time: Mapped[datetime] = mapped_column(UtcDateTime)
    """By the engine's clock."""


class MetricRow(Row):
    """One figure of one step."""

    __tablename__ = "metrics"
    # Clustered by its key: a series is read from neighbouring pages.
    __table_args__ = ({"sqlite_with_rowid": False},)

    job_id: Mapped[str] = _job_key()
    key: Mapped[str] = mapped_column(String, primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float | None] = mapped_column(Double)
    """None where the figure was not a number."""


class SampleRow(Row):
    """One completion the policy wrote."""

    __tablename__ = "samples"
    __table_args__ = (Index(None, "job_id", "step", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(String, ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    source: Mapped[str] = mapped_column(String)
    problem: Mapped[str] = mapped_column(Text)
    completion: Mapped[str] = mapped_column(Text)
    gold: Mapped[str] = mapped_column(Text)
    reward: Mapped[float | None] = mapped_column(Double)


class CheckpointRow(Row):
    """A whole checkpoint of a run."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = _job_key()
    step: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(Text)
    """Resumable state, relative to the run directory. Old ones may have been deleted."""
    adapter: Mapped[str] = mapped_column(Text)
    """Exported adapter, relative to the run directory; empty for a full student without one."""
    sha256: Mapped[str] = mapped_column(String)
    rank: Mapped[int]
    accuracy: Mapped[float | None] = mapped_column(Double)
    best: Mapped[bool] = mapped_column(Boolean)
    """The best of the job so far; at most one of a job's checkpoints is."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AdapterRow(Row):
    """A trained adapter that inference can load, under the immutable name JOB@STEP."""

    __tablename__ = "adapters"
    __table_args__ = (Index(None, "job_id", "step"),)

    name: Mapped[str] = mapped_column(String, primary_key=True)
    job_id: Mapped[str] = mapped_column(String, ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    path: Mapped[str] = mapped_column(Text)
    """Relative to the run directory."""
    base_model: Mapped[str] = mapped_column(String)
    rank: Mapped[int]
    sha256: Mapped[str] = mapped_column(String)
    template: Mapped[dict[str, Any]] = mapped_column(Json)
    """The spec's template; the one in force lies in the adapter's bridge.json."""
    accuracy: Mapped[float | None] = mapped_column(Double)
    status: Mapped[str] = mapped_column(String)
    """`registered`, `ready` (it has answered) or `failed`."""
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AliasRow(Row):
    """A user's own name for an adapter; it may be moved to another one."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String, primary_key=True)
    adapter: Mapped[str] = mapped_column(
        String, ForeignKey("adapters.name", ondelete="CASCADE"), index=True
    )
    """JOB@STEP."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class DatasetRow(Row):
    """An uploaded dataset."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(String)
    filename: Mapped[str] = mapped_column(Text)
    rows: Mapped[int]
    with_solution: Mapped[int]
    """How many rows have a worked solution."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
