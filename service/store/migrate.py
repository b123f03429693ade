"""Brings the tables of a database to this version of Bridge, with Alembic.

`python -m service migrate` and the service's start call `upgrade`; the `alembic` command works too
(`alembic.ini` at the repository's root).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

from service.store.database import Database

LOCK_TIMEOUT = "5s"
"""On Postgres. A table lock waited for longer than this blocks the readers queued behind it."""
STATEMENT_TIMEOUT = "5min"
LONGEST_WAIT = 600.0
"""Seconds to wait for another process's migrations."""
ADVISORY_LOCK = 7_305_129
"""Any number, the same in every process that migrates."""


def config(url: str) -> Config:
    """Alembic's configuration for this database, wherever Bridge is installed."""
    settings = Config()
    settings.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    settings.attributes["url"] = url
    return settings


def upgrade(url: str, revision: str = "head") -> None:
    """Creates or updates the tables; does nothing when they are up to date.

    Several processes may call it at the same time: one does the work, the others wait for it.
    Raises StoreUnavailable.
    """
    make_folder(url)
    _with_connection(url, revision, command.upgrade)


def downgrade(url: str, revision: str) -> None:
    """Takes migrations back, down to `revision` (`base` for none at all)."""
    _with_connection(url, revision, command.downgrade)


def is_current(url: str) -> bool:
    """Are the tables those of this version? Raises StoreUnavailable."""
    head = ScriptDirectory.from_config(config(url)).get_current_head()
    database = Database(url)
    try:
        with database.read() as session:
            context = MigrationContext.configure(session.connection())
            return context.get_current_revision() == head
    finally:
        database.close()


def make_folder(url: str) -> None:
    """SQLite makes its file, but not the folder it lies in."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)


def _with_connection(url: str, revision: str, run: Callable[[Config, str], None]) -> None:
    database, settings = Database(url), config(url)
    try:
        with database.connection() as connection:
            settings.attributes["connection"] = connection
            run(settings, revision)
    finally:
        database.close()
