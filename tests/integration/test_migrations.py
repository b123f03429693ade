"""Migrations lead to the tables that the code expects, and back, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event, inspect, text

from service.store import Store, StoreUnavailable
from service.store.database import Database
from service.store.migrate import config, downgrade, is_current, upgrade
from service.store.models import Row
from tests.support.jobs import submit
from tests.support.postgres import Postgres

REPOSITORY = Path(__file__).parents[2]


def revisions() -> list[str]:
    """All revisions, the first one first."""
    scripts = ScriptDirectory.from_config(config("sqlite://"))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def tables(url: str) -> set[str]:
    return set(inspect(Database(url).engine).get_table_names()) - {"alembic_version"}


def test_there_is_one_line_of_history() -> None:
    scripts = ScriptDirectory.from_config(config("sqlite://"))
    assert len(scripts.get_heads()) == 1
    assert len(scripts.get_bases()) == 1


def test_migrated_tables_are_those_of_the_models(empty_url: str) -> None:
    upgrade(empty_url)
    with Database(empty_url).engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []
    assert tables(empty_url) == set(Row.metadata.tables)


def test_every_migration_goes_up_down_and_up_again(empty_url: str) -> None:
    for revision in revisions():
        upgrade(empty_url, revision)
        downgrade(empty_url, "-1")
        upgrade(empty_url, revision)
    assert is_current(empty_url)
    downgrade(empty_url, "base")
    assert tables(empty_url) == set()
    assert not is_current(empty_url)


def test_upgrading_again_keeps_what_is_there(database_url: str) -> None:
    job_id = submit(Store(database_url))
    upgrade(database_url)
    assert Store(database_url).get_job(job_id).status == "queued"


def test_a_failed_migration_leaves_no_half(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half-way")

    with monkeypatch.context() as broken:
        broken.setattr(op, "create_index", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            upgrade(empty_url)
    assert tables(empty_url) == set()
    upgrade(empty_url)
    assert is_current(empty_url)


def test_migrating_at_the_same_time_is_harmless(empty_url: str) -> None:
    code = "import sys; from service.store.migrate import upgrade; upgrade(sys.argv[1])"
    several = [
        subprocess.Popen([sys.executable, "-c", code, empty_url], cwd=REPOSITORY) for _ in range(2)
    ]
    assert [process.wait(240) for process in several] == [0, 0]
    assert is_current(empty_url)


def test_alembic_command_uses_the_settings(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new folder' / 'bridge.db'}"
    environment = {**os.environ, "BRIDGE_DATABASE_URL": url}
    for verb in (["upgrade", "head"], ["check"]):
        command = [sys.executable, "-m", "alembic", *verb]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    assert is_current(url)


def test_jobs_of_the_version_before_come_along_and_paused_ones_go_back(empty_url: str) -> None:
    upgrade(empty_url, "0001")
    columns = (
        "id, kind, method, model, status, wanted, spec, latest, attempt, lost_attempts, "
        "progress_step, total_steps, created_at, queued_at"
    )
    values = (
        "'job_1', 'train', 'sft', 'm', 'queued', 'run', '{}', '{}', 0, 0, 0, 1, "
        "CURRENT_TIMESTAMP, CURRENT_TIMESTAMP"
    )
    with Database(empty_url).write() as session:
        session.execute(text(f"INSERT INTO jobs ({columns}) VALUES ({values})"))
    upgrade(empty_url)
    store = Store(empty_url)
    job = store.get_job("job_1")
    assert (job.project_id, job.queue, job.priority, job.retries) == ("default", "any", 0, 0)
    assert store.project("default").max_running is None
    store.request("job_1", "pause")
    store.close()
    downgrade(empty_url, "0001")
    with Database(empty_url).read() as session:
        status = session.scalar(text("SELECT status FROM jobs"))
        message = session.scalar(text("SELECT job_id FROM outbox"))
    assert (status, message) == ("queued", "job_1")


def test_indexes_are_built_while_the_table_is_written(postgres: Postgres) -> None:
    """A plain CREATE INDEX would wait for the writer, and everybody else behind it."""
    url = postgres.empty()
    upgrade(url, "0002_control")
    downgrade(url, "0001")
    statements: list[str] = []

    def note(*args: Any) -> None:
        statements.append(args[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        upgrade(url, "0002_control")
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    on_jobs = [s for s in statements if "CREATE INDEX" in s and " ON jobs " in s]
    assert len(on_jobs) == 2
    assert all("CREATE INDEX CONCURRENTLY" in s for s in on_jobs)
    limits = [s for s in statements if s.startswith("SET lock_timeout")]
    assert limits[0] == "SET lock_timeout = '5s'", "before anything that locks a table"


def test_a_migration_that_was_broken_off_goes_on(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns are there already when the indexes fail, which are built outside a transaction."""
    url = postgres.empty()
    upgrade(url, "0001")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken off")

    with monkeypatch.context() as broken:
        broken.setattr(op, "create_index", fail)
        with pytest.raises(RuntimeError, match="broken off"):
            upgrade(url)
    assert not is_current(url)
    upgrade(url)
    assert is_current(url)
    assert "ix_jobs_waiting" in {
        i["name"] for i in inspect(Database(url).engine).get_indexes("jobs")
    }


def test_a_migration_gives_up_on_a_table_in_use(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every reader that comes later would wait behind it."""
    monkeypatch.setattr("service.store.migrate.LOCK_TIMEOUT", "100ms")
    url = postgres.empty()
    upgrade(url)
    with Database(url).read() as reader:
        reader.execute(text("SELECT count(*) FROM jobs"))
        with pytest.raises(StoreUnavailable, match="locked"):
            downgrade(url, "base")
        assert reader.scalar(text("SELECT count(*) FROM jobs")) == 0, "it is as it was"
    upgrade(url)  # what had been gone back on before it gave up
    assert is_current(url)
