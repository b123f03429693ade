"""The recipes for the paper's models: accepted, their costs told, with neither model nor net."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bridge_engine.models.known import KNOWN
from bridge_engine.spec.yaml import load_yaml

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(file.name for file in FOLDER.glob("*.yaml"))
FORMS: dict[str, Any] = {
    "lora": "lora",
    "full": "full",
    "full, shadow bfloat16 on the host": {
        "form": "full",
        "shadow_dtype": "bfloat16",
        "shadow_offload": True,
    },
}
GB = 1e9


@pytest.fixture(autouse=True)
def _math(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATH's file is there (a dry run does not open it); the hub is not."""
    (tmp_path / "math_train.jsonl.gz").touch()
    monkeypatch.setenv("BRIDGE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", _no_network)


def _no_network(*_: Any) -> None:
    raise AssertionError("a dry run of a recipe asked the network")


def dry_run(client: TestClient, recipe: str, **changes: Any) -> Any:
    spec = load_yaml((FOLDER / recipe).read_text("utf-8")) | changes
    response = client.post("/jobs", json=spec, params={"dry_run": True})
    assert response.status_code == 200, response.text
    return response.json()


def test_there_is_a_recipe_for_each_of_the_papers_models(client: TestClient) -> None:
    specs = [dry_run(client, recipe)["spec"] for recipe in RECIPES]
    assert sorted(spec["model"] for spec in specs) == sorted(KNOWN)
    assert {spec["method"]["name"] for spec in specs} == {"bridge"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_as_yaml_answers_memory_and_time_and_fits_the_gpu_it_is_for(
    client: TestClient, recipe: str
) -> None:
    response = client.post(
        "/jobs?dry_run=true",
        content=(FOLDER / recipe).read_bytes(),
        headers={"Content-Type": "application/yaml"},
    )
    assert response.status_code == 200, response.text
    estimates = response.json()["estimates"]
    assert 20 * GB < estimates["memory_bytes"] < 80 * GB
    parts = estimates["memory"]
    larger = max(parts["sampling"], parts["training"])
    whole = parts["process"] + parts["base"] + parts["trained"] + larger
    assert estimates["memory_bytes"] == whole
    assert set(estimates["seconds"]) == {"h200", "a100", "cpu_core"}
    assert estimates["seconds"]["h200"] < estimates["seconds"]["a100"]
    assert estimates["exported_rank"] == 64
    assert "80 GB GPU" in (FOLDER / recipe).read_text("utf-8")


def test_the_readmes_table_is_what_the_dry_run_answers(client: TestClient) -> None:
    rows = [row(client, *each) for each in itertools.product(RECIPES, FORMS)]
    readme = (FOLDER / "README.md").read_text("utf-8")
    missing = [line for line in rows if line not in readme]
    assert not missing, "README.md should say:\n" + "\n".join(rows)


def row(client: TestClient, recipe: str, form: str) -> str:
    """One line of the table."""
    bridge = dry_run(client, recipe, student=FORMS[form])
    rl = dry_run(client, recipe, student=FORMS[form], method="rl")["estimates"]
    model, estimates = bridge["spec"]["model"].partition("/")[2], bridge["estimates"]
    parts = (estimates["memory"][part] for part in ("base", "trained", "sampling", "training"))
    cells = [
        model,
        form,
        f"{estimates['memory_bytes'] / GB:.0f}",
        " / ".join(f"{part / GB:.0f}" for part in parts),
        *(f"{estimates['seconds'][device] / 3600:.0f}" for device in ("h200", "a100")),
        f"{estimates['memory_bytes'] / rl['memory_bytes']:.2f}",
        f"{estimates['seconds']['h200'] / rl['seconds']['h200']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"
