"""The store: one class over everything that is kept."""

from __future__ import annotations

from service.settings import Settings, get_settings
from service.store.adapters import Adapters
from service.store.artifacts import Artifacts
from service.store.claims import Claims
from service.store.control import Control
from service.store.datasets import Datasets
from service.store.jobs import Jobs
from service.store.leases import Leases
from service.store.outbox import Outbox
from service.store.projects import Projects
from service.store.series import Series
from service.store.stream import Stream


class Store(
    Jobs, Control, Claims, Leases, Outbox, Projects, Stream, Series, Adapters, Artifacts, Datasets
):
    """The database as the service and its workers see it; safe to share between threads.

    Each method is one transaction. All of them raise StoreUnavailable when the database cannot do
    its work now; those that name a job, an adapter or a dataset raise NotFound.
    """

    def __init__(self, url: str, *, max_attempts: int = 5, retry_seconds: float = 5.0) -> None:
        super().__init__(url)
        self.max_attempts = max_attempts
        self.retry_seconds = retry_seconds

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> Store:
        """The store that the settings (default: this process's) name."""
        settings = settings or get_settings()
        return cls(
            settings.database_url,
            max_attempts=settings.max_attempts,
            retry_seconds=settings.retry_seconds,
        )
