"""Everything that is kept, and the one place that talks SQL; workers use it too.

`Store` is the whole of it: each method one transaction, alike on SQLite and Postgres. Rows come
back detached: they are what was true when they were read.
"""

from service.store.errors import (
    Conflict,
    NotFound,
    StaleAttempt,
    StoreError,
    StoreUnavailable,
    breakdown,
)
from service.store.ids import new_id
from service.store.leases import Claim
from service.store.models import (
    AdapterRow,
    AliasRow,
    AttemptRow,
    CheckpointRow,
    DatasetRow,
    EventRow,
    JobRow,
    OutboxRow,
    SampleRow,
)
from service.store.series import Point
from service.store.status import STATUSES, TERMINAL, TRANSITIONS, Status
from service.store.store import Store

__all__ = [
    "STATUSES",
    "TERMINAL",
    "TRANSITIONS",
    "AdapterRow",
    "AliasRow",
    "AttemptRow",
    "CheckpointRow",
    "Claim",
    "Conflict",
    "DatasetRow",
    "EventRow",
    "JobRow",
    "NotFound",
    "OutboxRow",
    "Point",
    "SampleRow",
    "StaleAttempt",
    "Status",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "breakdown",
    "new_id",
]
