"""The tables. Each class is a table and, read and detached, the row that callers get.

Timestamps are aware UTC datetimes, JSON keeps the order of its keys (`columns`), and paths are
relative to the job's run directory.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, Double, ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from service.store.columns import Json, Row, RowId, UtcDateTime, job_key
from service.store.status import TERMINAL

DEFAULT_PROJECT = "default"
"""The project of whoever names none; the migration creates it."""


class ProjectRow(Row):
    """Whose jobs these are, how many may run at a time, and what they may use up."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(String)
    max_running: Mapped[int | None]
    """Jobs that workers may hold at a time; None: any number."""
    gpu_hours: Mapped[float | None] = mapped_column(Double)
    """No job that needs a GPU is started once these are used up; None: no limit."""
    gpu_seconds_used: Mapped[float] = mapped_column(Double, server_default=text("0"))
    """By attempts that have ended: seconds held times GPUs held."""
    served_at: Mapped[float | None] = mapped_column(Double)
    """When a job of it was last claimed, by the database's clock: see `queues`."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class WorkerRow(Row):
    """A worker process that lives, and what it serves. Told anew every few seconds."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String, primary_key=True)
    queues: Mapped[list[str]] = mapped_column(Json)
    gpus: Mapped[int]
    """GPUs it may use, free or not."""
    slots: Mapped[int]
    """Jobs it runs at the same time."""
    expires_at: Mapped[float] = mapped_column(Double)
    """Seconds since the epoch by the database's clock: silent for so long, it counts as gone."""


class JobRow(Row):
    """A job: what was asked for, where it stands, who works on it."""

    __tablename__ = "jobs"
    __table_args__ = (
        # One index a list: newest first, within a status or a method; and the workers' two looks.
        Index(None, "status", "id"),
        Index(None, "method", "id"),
        Index(None, "name", "id"),
        Index(None, "status", "lease_expires_at"),
        Index(None, "project_id", "id"),
        # Where what is taken next of a project and a queue is found: see `queues`.
        Index(
            "ix_jobs_waiting",
            "project_id",
            "queue",
            "priority",
            "id",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
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
    """What its owner wants: `run`, `pause` or `cancel`."""
    project_id: Mapped[str] = mapped_column(String, server_default=DEFAULT_PROJECT)
    queue: Mapped[str] = mapped_column(String, server_default="any")
    """What a worker must have to run it: see `service.store.queues`."""
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    """-100…100; higher ones are taken first."""
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
    not_before: Mapped[float | None] = mapped_column(Double)
    """It broke down and waits: no worker gets it until then, by the database's clock."""
    worker_id: Mapped[str | None] = mapped_column(String)
    lease_expires_at: Mapped[float | None] = mapped_column(Double)
    """Seconds since the epoch by the database's clock."""
    claimed_at: Mapped[float | None] = mapped_column(Double)
    """The same, of the attempt that holds it."""
    gpus_held: Mapped[int] = mapped_column(server_default=text("0"))
    """GPUs that its attempt was given; 0 while nobody holds it."""
    retries: Mapped[int] = mapped_column(server_default=text("0"))
    """How often its owner has had it tried again after its end."""
    retried_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """The last event's seq at the latest retry: an end told up to there is no end any more."""
    forked_from: Mapped[str | None] = mapped_column(String)
    """The job it was made from."""
    forked_step: Mapped[int | None]
    """The checkpoint of that job whose parameters it starts from; None: it starts afresh."""

    progress_step: Mapped[int]
    """Finished steps. No figure stored is of a later one."""
    rolled_steps: Mapped[int] = mapped_column(default=0, server_default="0")
    """The figures of steps below this one are summed up in `rollups`, in whole buckets."""
    total_steps: Mapped[int]
    best_step: Mapped[int | None]
    """Step of the checkpoint with the highest held-out accuracy."""
    checkpoint_step: Mapped[int | None]
    """Step of the newest checkpoint."""

    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Its owner has deleted it: nobody sees it any more, what it left is being removed."""

    idempotency_key: Mapped[str | None] = mapped_column(String, unique=True)
    idempotency_hash: Mapped[str | None] = mapped_column(String)

    @property
    def retry_at(self) -> datetime | None:
        """When it is tried again at the earliest; None unless it is queued after it broke down."""
        if self.not_before is None or self.status != "queued":
            return None
        return datetime.fromtimestamp(self.not_before, UTC)

    @property
    def adapter(self) -> str | None:
        """Name of the adapter to use: the best measured one, else the newest, else None."""
        if self.kind != "train":
            return None
        step = self.best_step if self.best_step is not None else self.checkpoint_step
        if not self._exports_adapters and step not in (self.best_step, self.total_steps):
            return None  # whole models are written at the best and at the last step alone
        return None if step is None else f"{self.id}@{step}"

    @property
    def _exports_adapters(self) -> bool:
        """A full student has one only where the spec asks for it."""
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
    not_before: Mapped[float | None] = mapped_column(Double)
    """A worker could not take the job: it is not told again until then, by the database's clock."""


class AttemptRow(Row):
    """One worker's try at a job."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = job_key()
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(String)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    gpus: Mapped[int] = mapped_column(server_default=text("0"))
    """GPUs it was given."""
    outcome: Mapped[str | None] = mapped_column(String)
    """`succeeded`, `failed`, `cancelled`, `paused`, `released` (handed back) or `lost` (broke down,
    also while its job was being cancelled or paused); None as it runs."""
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)


class EventRow(Row):
    """One event of a run, as the engine wrote it (`bridge_engine.events`)."""

    __tablename__ = "events"

    job_id: Mapped[str] = job_key()
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

    job_id: Mapped[str] = job_key()
    key: Mapped[str] = mapped_column(String, primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float | None] = mapped_column(Double)
    """None where the figure was not a number."""


class RollupRow(Row):
    """What a metric's points in one bucket of `level` steps come to (`service.store.rollups`)."""

    __tablename__ = "rollups"
    __table_args__ = ({"sqlite_with_rowid": False},)

    job_id: Mapped[str] = job_key()
    key: Mapped[str] = mapped_column(String, primary_key=True)
    level: Mapped[int] = mapped_column(primary_key=True)
    """Steps a bucket has."""
    bucket: Mapped[int] = mapped_column(primary_key=True)
    """The steps from bucket · level to (bucket + 1) · level, that one excluded."""
    points: Mapped[int]
    """How many there are."""
    first_step: Mapped[int]
    first: Mapped[float | None] = mapped_column(Double)
    last_step: Mapped[int]
    last: Mapped[float | None] = mapped_column(Double)
    low_step: Mapped[int]
    low: Mapped[float | None] = mapped_column(Double)
    """The smallest value, at the first of the steps that have it; None: none was a number."""
    high_step: Mapped[int]
    high: Mapped[float | None] = mapped_column(Double)


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

    job_id: Mapped[str] = job_key()
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
    """A trained adapter that inference can load, under the immutable name JOB@STEP; the whole model
    of a full student that has no adapter."""

    __tablename__ = "adapters"
    __table_args__ = (Index(None, "job_id", "step"),)

    name: Mapped[str] = mapped_column(String, primary_key=True)
    job_id: Mapped[str] = mapped_column(String, ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    path: Mapped[str] = mapped_column(Text)
    """Relative to the run directory."""
    base_model: Mapped[str] = mapped_column(String)
    rank: Mapped[int]
    """0: a whole model."""
    sha256: Mapped[str] = mapped_column(String)
    """Of the weights; of a whole model's manifest, which has the hash of each file."""
    template: Mapped[dict[str, Any]] = mapped_column(Json)
    """The one in force, which the adapter's bridge.json has too; of an older run the spec's."""
    accuracy: Mapped[float | None] = mapped_column(Double)
    status: Mapped[str] = mapped_column(String)
    """`registered`, `ready` (it has answered) or `failed`."""
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    @property
    def is_model(self) -> bool:
        """A whole model, of a full student."""
        return self.rank == 0


class ArtifactRow(Row):
    """A folder of a run that lies, whole, in the artifact store."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = job_key()
    path: Mapped[str] = mapped_column(String, primary_key=True)
    """In the run directory: `checkpoints/step-000020`."""
    step: Mapped[int]
    prefix: Mapped[str] = mapped_column(Text)
    """In the store, where nothing else was or will be written."""
    sha256: Mapped[str] = mapped_column(String)
    """Of its manifest, which has those of its files."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RemainRow(Row):
    """What may lie in the artifact store though no row names it: an upload that begins before its
    job is written, and what may still come in of a job that was deleted."""

    __tablename__ = "remains"

    prefix: Mapped[str] = mapped_column(String, primary_key=True)
    noted_at: Mapped[float] = mapped_column(Double)
    """Seconds since the epoch by the database's clock."""


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
