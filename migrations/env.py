"""How Alembic reaches the database: a connection it is given, or the one the settings name.

On Postgres a migration must not stand in the way of a live service: it gives up its place in the
queue for a lock after a few seconds rather than holding everybody else up, and one migration at a
time is let in. All of a run's migrations are one transaction, on both databases.
"""

from alembic import context
from sqlalchemy import Connection, text

from service.settings import get_settings
from service.store.database import create_database, database_url
from service.store.migrate import ADVISORY_LOCK, LOCK_TIMEOUT, STATEMENT_TIMEOUT, make_folder
from service.store.models import Row, UtcDateTime


def migrate(connection: Connection) -> None:
    """Runs the migrations on this connection."""
    if connection.dialect.name == "postgresql":
        # Waiting for another migration may take as long as that one does.
        connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        render_item=_render,
    )
    with context.begin_transaction():
        context.run_migrations()


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
    with engine.begin() as own:
        migrate(own)
    engine.dispose()


main()
