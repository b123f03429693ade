"""`bridge demo`, shortened: the whole way in one command, and the figures it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import make_house

pytestmark = pytest.mark.e2e


def test_the_demo_goes_the_whole_way_and_leaves_its_figures(tmp_path: Path) -> None:
    house = make_house(tmp_path)
    done = house.bridge("demo", "--port", str(house.port), "--steps", "2", "--seed", "1", "--stop")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "demo.json").read_text())
    for end in ("before", "after"):
        low, high = record[f"accuracy_{end}_ci"]
        assert 0 <= low <= record[f"accuracy_{end}"] <= high <= 1
    assert record["adapter"].startswith(record["job_id"])
    assert (record["seed"], record["steps"]) == (1, 2)
    assert record["seconds"] > 0
    assert isinstance(record["answer"], str)
    assert f"curl -s {house.url}/generate" in done.stdout
    assert record["adapter"] in done.stdout
    assert "step 2/2" in done.stdout
    assert house.home.running() is None
