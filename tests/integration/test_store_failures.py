"""What the store says when the database cannot do its work; and datasets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from service.store import JobRow, NotFound, Store, StoreUnavailable
from tests.support.jobs import run_to, spec
from tests.support.postgres import Postgres
from tests.support.waiting import until


def test_datasets_are_listed_newest_first(store: Store) -> None:
    facts = {"filename": "a.jsonl", "rows": 3, "with_solution": 1, "bytes": 2**40, "sha256": "0"}
    first = store.add_dataset(name="a", **facts)
    second = store.add_dataset(name="b", **facts)
    assert first.id.startswith("ds_")
    assert store.get_dataset(first.id).bytes == 2**40
    assert [d.id for d in store.list_datasets()[0]] == [second.id, first.id]
    assert store.list_datasets(after=second.id, limit=1)[1] is False
    with pytest.raises(NotFound):
        store.get_dataset("ds_nope")


def test_database_without_tables_says_to_migrate(empty_url: str) -> None:
    with pytest.raises(StoreUnavailable, match="python -m service migrate") as refused:
        Store(empty_url).ping()
    assert refused.value.reason == "not_migrated"


def test_unreachable_postgres_says_so_without_the_password() -> None:
    with pytest.raises(StoreUnavailable, match="BRIDGE_DATABASE_URL") as refused:
        Store("postgresql://user:secret@127.0.0.1:1/bridge").ping()
    assert refused.value.reason == "unreachable"
    assert "secret" not in refused.value.message


def test_a_postgres_that_stands_still_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes the connection, and nobody says a word on it."""
    monkeypatch.setattr("service.store.database.CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as standing:
        url = f"postgresql://user:secret@127.0.0.1:{standing.getsockname()[1]}/bridge"
        with pytest.raises(StoreUnavailable, match="timeout") as refused:
            Store(url).ping()
    assert refused.value.reason == "unreachable"


def test_a_connection_that_was_lost_as_it_lay_idle_costs_nobody_anything(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(postgres.migrated())
    monkeypatch.setattr("service.store.database.FRESH_SECONDS", 0)
    for _ in range(2):
        store.ping()
        cut_off_others(postgres)
    store.ping()
    monkeypatch.setattr("service.store.database.FRESH_SECONDS", 60)
    cut_off_others(postgres)
    with pytest.raises(StoreUnavailable) as refused:
        store.ping()
    assert refused.value.reason == "unreachable"
    store.ping()
    store.close()


def test_who_stands_still_in_a_transaction_keeps_no_job_from_others(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was stopped just there: its job is passed over, not waited for, by whoever
    looks for those whose lease has run out."""
    monkeypatch.setattr("service.store.database.ABANDONED_SECONDS", 1)
    url = postgres.migrated()
    still, other = Store(url), Store(url, retry_seconds=0)
    job_id = run_to(other, "running")
    with other.write() as session:
        session.execute(update(JobRow).values(lease_expires_at=1.0))

    def stand_still() -> None:
        with still.write() as session:
            session.execute(select(JobRow).with_for_update())
            until(lambda: other.requeue_expired() == [job_id])
            session.execute(text("SELECT 1"))

    with pytest.raises(StoreUnavailable) as woken:
        stand_still()
    assert woken.value.reason == "unreachable"
    still.ping()
    still.close()
    other.close()


def cut_off_others(postgres: Postgres) -> None:
    """Ends every connection to the database of the tests."""
    other = Store(postgres.migrated())
    here = "datname = current_database() AND pid <> pg_backend_pid()"
    execute(other, f"SELECT pg_terminate_backend(pid, 50000) FROM pg_stat_activity WHERE {here}")
    other.close()


def test_locked_sqlite_says_so(migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.database.BUSY_SECONDS", 0.1)
    url = f"sqlite:///{migrated_sqlite}"
    with Store(url).write() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(StoreUnavailable, match="locked") as refused:
            Store(url).create_job(spec(), total_steps=1)
    assert refused.value.reason == "locked"


def test_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="folder exists") as refused:
        Store(f"sqlite:///{tmp_path}/none/bridge.db").ping()
    assert refused.value.reason == "unreachable"


def test_full_disk_says_so(store: Store, engine_name: str) -> None:
    with store.write() as session:
        if engine_name == "sqlite":
            pages = session.scalar(text("PRAGMA page_count"))
            session.execute(text(f"PRAGMA max_page_count = {pages}"))
    fill = {
        "sqlite": "CREATE TABLE big AS SELECT randomblob(1000000) AS b",
        "postgres": "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$",
    }
    with pytest.raises(StoreUnavailable, match="No space is left") as refused:
        execute(store, fill[engine_name])
    assert refused.value.reason == "full"


def execute(store: Store, statement: str) -> None:
    with store.write() as session:
        session.execute(text(statement))
