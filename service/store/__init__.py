"""Everything that is kept, and the one place that talks SQL; workers use it too.

`Store` is the whole of it: each method one transaction, alike on SQLite and Postgres. Rows come
back detached: they are what was true when they were read.
"""

from service.store.artifacts import Artifact
from service.store.claims import Claim
from service.store.errors import (
    Conflict,
    NotFound,
    StaleAttempt,
    StoreError,
    StoreUnavailable,
    breakdown,
)
from service.store.ids import new_id
from service.store.models import (
    AdapterRow,
    AliasRow,
    ArtifactRow,
    AttemptRow,
    CheckpointRow,
    DatasetRow,
    EventRow,
    JobRow,
    OutboxRow,
    ProjectRow,
    SampleRow,
    WorkerRow,
)
from service.store.queues import QUEUES, Offer
from service.store.status import REQUESTS, STATUSES, TERMINAL, TRANSITIONS, Request, Status
from service.store.store import Store
from service.store.thinning import Point

__all__ = [
    "QUEUES",
    "REQUESTS",
    "STATUSES",
    "TERMINAL",
    "TRANSITIONS",
    "AdapterRow",
    "AliasRow",
    "Artifact",
    "ArtifactRow",
    "AttemptRow",
    "CheckpointRow",
    "Claim",
    "Conflict",
    "DatasetRow",
    "EventRow",
    "JobRow",
    "NotFound",
    "Offer",
    "OutboxRow",
    "Point",
    "ProjectRow",
    "Request",
    "SampleRow",
    "StaleAttempt",
    "Status",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "WorkerRow",
    "breakdown",
    "new_id",
]
