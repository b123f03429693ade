"""Training jobs side by side."""

from __future__ import annotations

from typing import Any

import pytest

from bridge_client import comparison
from bridge_client.models import Job


def job(method: str, accuracy: float | None, **fields: Any) -> Job:
    spec = {"method": method, "seed": len(method), "steps": 8, "data": {"prompts": "gsm8k"}}
    result = {
        "accuracy_before": 0.1,
        "accuracy_after": accuracy,
        "accuracy_after_ci": [0.2, 0.4],
        "num_rollouts": 640,
        "num_updates": 8,
        "seconds": 12.4,
    }
    return Job(
        id=f"job_{method}",
        status="succeeded",
        method=method,
        step=8,
        steps=8,
        spec={**spec, **fields.pop("spec", {})},
        result=None if accuracy is None else result,
        **fields,
    )


def test_the_best_comes_first_and_one_without_a_score_last() -> None:
    found = comparison.compare([job("sft", 0.3), job("rl", None), job("bridge", 0.5)])
    assert [one["method"] for one in found["jobs"]] == ["bridge", "sft", "rl"]
    assert [one["accuracy_after"] for one in found["jobs"]] == [0.5, 0.3, None]


def test_what_was_spent_is_told_beside_the_score_also_of_a_job_that_still_runs() -> None:
    latest = {"accuracy": 0.25, "num_rollouts": 320.0, "num_updates": 4.0}
    found = comparison.compare([job("mix", None, latest=latest), job("sft", 0.2)])
    ours, theirs = found["jobs"]
    assert (ours["num_rollouts"], ours["num_updates"], ours["seconds"]) == (320, 4, None)
    assert (theirs["num_rollouts"], theirs["num_updates"], theirs["seconds"]) == (640, 8, 12.4)
    assert ours["accuracy_after"] == 0.25


def test_fields_in_which_the_jobs_differ_beside_method_and_seed_are_named() -> None:
    other = {"steps": 16, "data": {"prompts": "svamp"}}
    found = comparison.compare([job("sft", 0.3), job("bridge", 0.5, spec=other)])
    assert found["unlike"] == {"steps": [16, 8], "data.prompts": ["svamp", "gsm8k"]}
    assert comparison.compare([job("sft", 0.3), job("bridge", 0.5)])["unlike"] == {}


def test_a_field_that_only_one_of_them_has_differs() -> None:
    found = comparison.unlike([{"a": {"b": 1}}, {"a": {}}])
    assert found == {"a.b": [1, None]}


def test_the_table_warns_of_what_was_not_asked_alike(capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"option{n}": n for n in range(9)}
    found = comparison.compare([job("sft", 0.3), job("bridge", 0.5, spec=many)])
    comparison.show(found)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1].split()[:3] == ["bridge", "10.0", "%"]
    assert "20.0 to 40.0" in lines[1]
    assert printed.err.startswith("not asked alike: option0 (0, None); ")
    assert "and 3 more" in printed.err
