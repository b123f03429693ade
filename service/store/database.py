"""Connections and transactions: where SQLite and Postgres are made to behave alike.

Every public method of the store is one transaction. On SQLite a writer takes the write lock at its
start (`BEGIN IMMEDIATE`), so that it waits its turn instead of failing half-way; on Postgres rows
are locked as they are touched, the job's own row always first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import from_json
from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Engine,
    Table,
    create_engine,
    event,
    make_url,
    or_,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from service.store.columns import Row, UtcDateTime
from service.store.errors import StoreUnavailable

BUSY_SECONDS = 10
"""How long a SQLite writer waits for its turn, and a Postgres one for a lock."""
CONNECT_SECONDS = 5
"""How long Postgres may take to answer a new connection."""
ABANDONED_SECONDS = 30
"""So long Postgres waits for the next word within a transaction, then undoes it. A process that
stands still in the middle of one would else keep its rows locked: its own job, which nobody could
take from it, and whatever else it was about to change."""
FRESH_SECONDS = 1.0
"""A connection to Postgres that was used less long ago is taken to be alive."""

_NOTICE_A_DEAD_NETWORK = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's: without them a cut cable holds a query, and whoever waits for it, for a quarter of an
hour."""


def database_url(url: str) -> str:
    """The URL with the driver that Bridge uses: `postgres://…` is what people have."""
    parsed = make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def create_database(url: str, **options: Any) -> Engine:
    """An engine whose connections behave alike on both databases."""
    parsed = make_url(database_url(url))
    options = {"pool_size": 10, "max_overflow": 20, "pool_timeout": BUSY_SECONDS, **options}
    options |= {"json_serializer": _dump, "json_deserializer": load_json}
    if parsed.get_backend_name() != "sqlite":
        if "options" not in parsed.query:
            settings = f"-c timezone=UTC -c lock_timeout={BUSY_SECONDS}s -c statement_timeout=60s"
            settings += f" -c idle_in_transaction_session_timeout={ABANDONED_SECONDS}s"
            options.setdefault("connect_args", {}).update(
                options=settings, connect_timeout=CONNECT_SECONDS, **_NOTICE_A_DEAD_NETWORK
            )
        engine = create_engine(parsed, **options)
        _ask_whether_alive(engine)
        return engine

    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS}, **options)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _ask_whether_alive(engine: Engine) -> None:
    """Connections that lay idle are asked before they are used, as by `pool_pre_ping`; not those
    that have just been: that would be one more way to and fro for each transaction."""

    @event.listens_for(engine, "checkin")
    def _lay_down(_: Any, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _take_up(connection: Any, record: Any, _: Any) -> None:
        since = record.info.get("idle_since")
        if since is None or time.monotonic() - since < FRESH_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool opens another one


def load_json(text: str | bytes) -> Any:
    """What the JSON says; in half the time of the standard library, which lists of jobs feel, and
    answers that are streamed."""
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)  # knows half of a surrogate pair, as engines may write one


def _dump(value: Any) -> str:
    if isinstance(value, JsonText):
        return str(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class epoch_now(FunctionElement[float]):
    """Seconds since the epoch by the database's clock: the one clock that leases go by."""

    type = Double()
    inherit_cache = True


@compiles(epoch_now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(epoch_now, "postgresql")
def _postgres_now(element: Any, compiler: Any, **_: Any) -> str:
    # clock_timestamp, not now(): the latter stands still during a transaction that waits
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


class Database:
    """A database and its transactions; the base of the store."""

    def __init__(self, url: str) -> None:
        self.url = make_url(database_url(url))
        self.engine = create_database(url)
        # Postgres takes a new look with every statement of a transaction, unless told otherwise.
        one_look = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reading = self.engine.execution_options(read_only=True, **one_look)

    def close(self) -> None:
        """Gives all connections back."""
        self.engine.dispose()

    def ping(self) -> None:
        """Raises StoreUnavailable unless the database answers and has Bridge's tables."""
        with self.read() as session:
            session.execute(text("SELECT id FROM jobs WHERE 1 = 0"))

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads: it sees one state and never waits for writers."""
        with self._session(read_only=True) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, or undone by an exception."""
        with self._session(read_only=False) as session:
            yield session

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A bare connection, for migrations: on SQLite one transaction, as `write`; on Postgres
        none has begun."""
        with self._explained(), self.engine.connect() as connection:
            if self.engine.dialect.name == "sqlite":
                with connection.begin():
                    yield connection
            else:
                yield connection

    @contextmanager
    def _session(self, read_only: bool) -> Iterator[Session]:
        engine = self._reading if read_only else self.engine
        with (
            self._explained(),
            Session(engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            if (unavailable := _unavailable(error, self.engine.dialect, self._where)) is None:
                raise
            raise unavailable from error

    @property
    def _is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def _where(self) -> str:
        """The database in words, without its password."""
        if self._is_sqlite:
            return f"the database file {self.url.database}"
        return f"the database {self.url.render_as_string(hide_password=True)}"


def _unavailable(error: SQLAlchemyError, dialect: Dialect, where: str) -> StoreUnavailable | None:
    """What to tell a person when the database itself is the trouble; None when it is not."""
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(
            f"All connections to {where} are in use; try again in a moment.", reason="locked"
        )
    if not isinstance(error, DBAPIError):
        return None
    said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else "no message"
    state = str(getattr(error.orig, "sqlstate", None) or "")
    low = said.lower()
    if "no such table" in low or "no such column" in low or state in ("42P01", "42703"):
        return StoreUnavailable(
            f"The tables of {where} are missing or older than this version of Bridge ({said}); "
            "run `python -m service migrate`.",
            reason="not_migrated",
        )
    if "disk is full" in low or state == "53100":
        return StoreUnavailable(
            f"No space is left on the disk of {where}; free some and try again.", reason="full"
        )
    if "readonly database" in low or state == "25006":
        return StoreUnavailable(
            f"This user may not write to {where}; make it writable.", reason="readonly"
        )
    if "database is locked" in low or state in ("55P03", "57014", "40P01", "40001"):
        return StoreUnavailable(
            f"Another program has kept {where} locked for over {BUSY_SECONDS} s; end it (an open "
            "sqlite3 or psql shell, a backup) and try again.",
            reason="locked",
        )
    if "unable to open database file" in low:
        return StoreUnavailable(
            f"Cannot open {where}; check that its folder exists and is writable.",
            reason="unreachable",
        )
    lost = error.connection_invalidated or state[:2] in ("08", "57", "28", "3D") or state == "53300"
    # psycopg has classes of its own below it, for a connection that does not come about in time
    if lost or (dialect.name == "postgresql" and isinstance(error, OperationalError)):
        return StoreUnavailable(
            f"Cannot reach {where} ({said}); check that it runs and that BRIDGE_DATABASE_URL is "
            "right.",
            reason="unreachable",
        )
    if type(error.orig).__name__ in ("OperationalError", "DatabaseError"):
        return StoreUnavailable(
            f"{where[0].upper()}{where[1:]} failed: {said}; check the disk and the file.",
            reason="failed",
        )
    return None


def insert_rows(
    session: Session, model: type[Row], columns: Sequence[str], rows: Iterable[tuple[Any, ...]]
) -> None:
    """Inserts many rows of new keys, each the values of these columns. As fast as the driver can:
    on Postgres by COPY, without a word about each row on either database."""
    table = model.__table__
    assert isinstance(table, Table)
    connection = session.connection()
    dialect = connection.dialect
    converters = [_converter(table.columns[name].type, dialect) for name in columns]
    if any(converters):
        rows = [
            tuple(v if f is None else f(v) for f, v in zip(converters, row, strict=True))
            for row in rows
        ]
    names = ", ".join(f'"{name}"' for name in columns)
    if dialect.name == "sqlite":
        places = ", ".join("?" * len(columns))
        if rows := list(rows):
            connection.exec_driver_sql(
                f"INSERT INTO {table.name} ({names}) VALUES ({places})", rows
            )
        return
    assert dialect.dbapi is not None
    statement = f"COPY {table.name} ({names}) FROM STDIN"
    cursor: Any = connection.connection.cursor()
    try:
        with closing(cursor), cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except dialect.dbapi.Error as error:  # as if it had come through SQLAlchemy
        raise DBAPIError.instance(
            statement, None, error, dialect.dbapi.Error, dialect=dialect
        ) from error


def _converter(type_: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """What makes of a value what the driver takes for it."""
    if isinstance(type_, JSON):
        return _json
    if isinstance(type_, UtcDateTime) and dialect.name == "sqlite":
        return type_.dialect_impl(dialect).bind_processor(dialect)
    return None


def long_ago(moment: InstrumentedAttribute[Any], seconds: float) -> ColumnElement[bool]:
    """Is it so long ago, or so far in the future: before somebody's clock was set back?"""
    now, long = datetime.now(UTC), timedelta(seconds=seconds)
    return or_(moment < now - long, moment > now + long)


def upsert(session: Session, model: type[Row], rows: Sequence[dict[str, Any]]) -> None:
    """Inserts rows; where the key exists already, the new values win."""
    if not rows:
        return
    table = model.__table__
    assert isinstance(table, Table)
    keys = [column.name for column in table.primary_key.columns]
    dialect = session.get_bind().dialect.name
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    values = {name: insert.excluded[name] for name in rows[0] if name not in keys}
    statement = insert.on_conflict_do_update(index_elements=keys, set_=values)
    session.execute(statement, list(rows))


def _json(value: Any) -> str | None:
    return None if value is None else _dump(value)


class JsonText(str):
    """JSON that is written as it is, into a column that takes JSON."""


def clean(value: Any) -> Any:
    """The value as both databases can hold it: Postgres knows no NUL in text, JSON no NaN."""
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, Iterable) and isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
