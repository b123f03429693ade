"""How Alembic reaches the database: a connection it is given, or the one the settings name.

On Postgres a migration must not stand in the way of a live service: it gives up its place in the
queue for a lock after a few seconds rather than holding everybody else up, and one migration at a
time is let in. On SQLite all of a run's migrations are one transaction, on Postgres each is one.
"""

import time

from alembic import context
from sqlalchemy import Connection, text

from service.settings import get_settings
from service.store.database import create_database, database_url
from service.store.errors import StoreUnavailable
from service.store.migrate import (
    ADVISORY_LOCK,
    LOCK_TIMEOUT,
    LONGEST_WAIT,
    STATEMENT_TIMEOUT,
    make_folder,
)
from service.store.models import Row, UtcDateTime  # by way of the page that has every table


def migrate(connection: Connection) -> None:
    """Runs the migrations on this connection.

    On SQLite within the transaction it has begun. On Postgres it must have begun none: each
    migration is a transaction, and may have statements that can be in none (`autocommit_block`).
    """
    postgres = connection.dialect.name == "postgresql"
    if postgres:
        _wait_for_others(connection)
        _be_brief(connection)
        connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        render_item=_render,
        transaction_per_migration=postgres,
        on_version_apply=(lambda **_: _be_brief(connection)) if postgres else None,
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
    finally:
        if postgres and not connection.closed:
            connection.rollback()
            connection.execute(text(f"SELECT pg_advisory_unlock({ADVISORY_LOCK})"))
            connection.commit()


def _wait_for_others(connection: Connection) -> None:
    """Asks again and again for the lock that lets one migration in at a time. Who waits within a
    statement keeps its snapshot, and an index that is built concurrently waits for all of them."""
    until = time.monotonic() + LONGEST_WAIT
    while not connection.scalar(text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})")):
        connection.commit()
        if time.monotonic() > until:
            raise StoreUnavailable(
                f"Another migration has run for over {LONGEST_WAIT / 60:.0f} min; wait for its "
                "end, or end it, and try again.",
                reason="locked",
            )
        time.sleep(0.2)


def _be_brief(connection: Connection) -> None:
    """Sets the time limits of statements that stand in others' way; a migration may lift them for
    one that does not."""
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))


def _render(kind: str, item: object, _: object) -> str | bool:
    """Our own types are written as what they are in the database: a migration is history and must
    not change when the code does."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def url() -> str:
    """Alembic's own option (`-x`-style callers, tests) wins over the settings."""
    given = context.config.attributes.get("url") or context.config.get_main_option("sqlalchemy.url")
    return given or get_settings().database_url


def main() -> None:
    """Entry: `alembic upgrade head --sql` prints the SQL, everything else runs it."""
    if context.is_offline_mode():
        context.configure(url=database_url(url()), target_metadata=Row.metadata, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    connection = context.config.attributes.get("connection")
    if connection is not None:
        migrate(connection)
        return
    make_folder(url())
    engine = create_database(url())
    with engine.connect() as own:
        if own.dialect.name == "postgresql":
            migrate(own)
        else:
            with own.begin():
                migrate(own)
    engine.dispose()


main()
