"""Real databases and brokers for the tests. Both kinds of database are started wherever tests run:
nothing is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store import Store
from service.store.migrate import upgrade
from tests.support.postgres import Postgres, running_postgres
from tests.support.redis import running_redis
from tests.support.s3 import running_s3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    """Who waits for the database's lock waits for whoever has it, however slow the disk is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.store.database.BUSY_SECONDS", 120)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with running_redis() as url:
        yield url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    with running_s3() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgres"])
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty_url(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, once on either engine."""
    if engine_name == "sqlite":
        return f"sqlite:///{tmp_path / 'bridge.db'}"
    return str(request.getfixturevalue("postgres").empty())


@pytest.fixture
def database_url(engine_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with Bridge's tables, once on either engine."""
    if engine_name == "sqlite":
        path = tmp_path / "bridge.db"
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), path)
        return f"sqlite:///{path}"
    return str(request.getfixturevalue("postgres").migrated())


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url, max_attempts=3, retry_seconds=0)
    yield store
    store.close()
