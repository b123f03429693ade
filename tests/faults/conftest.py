"""One house for the whole session: its parts are killed and started again, it is not."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checks import Undisturbed
from tests.faults.house import House

PER_ROUND = 7
FAULTS = int(os.environ.get("BRIDGE_FAULTS", 21))
"""How many to inject in all; rounded up to whole rounds."""
SEED = int(os.environ.get("BRIDGE_FAULT_SEED", 0))
"""The first round's: a long run goes on where it was broken off."""
SEEDS = range(SEED, SEED + -(-FAULTS // PER_ROUND))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(900))


class Figures:
    """What the run came to, written down after every round."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.injected: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.jobs = self.recoveries = self.rounds = 0
        self.seconds = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "faults": sum(self.injected.values()),
            "by_kind": dict(sorted(self.injected.items())),
            "found_nothing_to_befall": dict(sorted(self.missed.items())),
            "jobs": self.jobs,
            "recoveries": self.recoveries,
            "seconds": round(self.seconds),
        }

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    path = os.environ.get("BRIDGE_FAULT_REPORT")
    figures = Figures(Path(path) if path else None)
    yield figures
    print("\n" + json.dumps(figures.as_dict(), indent=1))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"))
    yield house
    house.close()
